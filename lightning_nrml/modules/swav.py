"""SwAV: predict the cluster code of one crop from other crops."""

from __future__ import annotations

from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_nrml import distributed
from lightning_nrml.losses import SwAVLoss
from lightning_nrml.losses.base import unit_rows
from lightning_nrml.losses.swav import sinkhorn
from lightning_nrml.memory import FeatureQueue
from lightning_nrml.models import projector
from lightning_nrml.modules.self_supervised import SelfSupervised
from lightning_nrml.types import Batch, StepOutput


class SwAV(SelfSupervised):
    """SwAV, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments".

    All crops are scored against unit prototypes; the codes of the large crops (Sinkhorn, balanced over
    the batch of all ranks and, late in training, a queue of earlier projections) are predicted from every
    other crop. One backbone pass per crop size, one projector pass for all. Source: Caron et al., NeurIPS
    2020, arXiv 2006.09882, section 3 and appendix A.

    The queue is one for all ranks, of which each brings its share to the Sinkhorn: the codes are those of
    one process, and checkpoints hold the whole. Small sets: queue and batch together should not be
    smaller than ``num_prototypes``. A ViT needs ``backbone_kwargs: {dynamic_img_size: true}`` for crops
    of two sizes. Images that a noise filter drops take part in the balance of their own batch's codes, which
    are made before the filter speaks, but in no loss and no queue.

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        num_prototypes: K, at least 2.
        temperature: of the predictions.
        epsilon: entropy of the codes; .03 for small sets.
        sinkhorn_iterations: normalisations of rows and columns.
        projector_hidden: width of the projector's hidden layer.
        projector_dim: size of the projections and prototypes.
        large_crops: the first views that give codes: of one size, and no view is larger.
        freeze_epochs: epochs in which the prototypes get no gradient.
        queue_size: projections per large crop kept over all ranks; 0 = no queue.
        queue_start_epoch: first epoch that fills the queue; it is used once it is full.

    Raises:
        ValueError: a size or ``epsilon`` is out of its range.
    """

    made_anew: ClassVar[tuple[str, ...]] = ("queues",)

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        num_prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        projector_hidden: int = 2048,
        projector_dim: int = 128,
        large_crops: int = 2,
        freeze_epochs: int = 1,
        queue_size: int = 0,
        queue_start_epoch: int = 15,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, **kwargs)
        for name, value, least in (
            ("num_prototypes", num_prototypes, 2),  # one alone is every crop's code: a loss of 0
            ("sinkhorn_iterations", sinkhorn_iterations, 1),
            ("large_crops", large_crops, 1),
            ("queue_size", queue_size, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}; 0.03 to 0.05 is usual.")
        self.projector = projector("swav", self.num_features, projector_hidden, projector_dim)
        self.prototypes = nn.Linear(projector_dim, num_prototypes, bias=False)
        self.loss = SwAVLoss(temperature)
        self.epsilon, self.sinkhorn_iterations = epsilon, sinkhorn_iterations
        self.large_crops, self.freeze_epochs = large_crops, freeze_epochs
        self.queue_start_epoch = queue_start_epoch
        rings = large_crops if queue_size else 0
        self.queues = nn.ModuleList(FeatureQueue(queue_size, projector_dim, False) for _ in range(rings))
        self._new_rows: list[Tensor] = []
        self._normalise_prototypes()

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def start_over(self) -> None:
        """Empty the queues: their rows were made by other weights."""
        for queue in self._rings():
            queue.reset()

    def on_train_start(self) -> None:
        """As the base; tells if the run is too short for the queue."""
        super().on_train_start()
        if len(self.queues):
            self.warn_if_never("queue_start_epoch", self.queue_start_epoch, "fills no queue")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """As the base; unit prototypes before the forward pass."""
        super().on_train_batch_start(batch, batch_idx)
        self._normalise_prototypes()

    def step(self, batch: Batch) -> StepOutput:
        """Score all crops, code the large ones."""
        views = self._crops(batch)
        h: list[Tensor] = []
        for _, group in groupby(views, key=lambda view: view.shape[-2:]):
            h += self.features(list(group), joint=True)
        z = unit_rows(self.projector(torch.cat(h)).float())
        with torch.autocast(z.device.type, enabled=False):  # codes magnify rounding errors by 1 / epsilon
            scores = list(F.linear(z, self.prototypes.weight.float()).chunk(len(views)))
        large = z.detach().chunk(len(views))[: self.large_crops]
        codes = [self.codes(scores[i].detach(), i) for i in range(self.large_crops)]
        self._new_rows = list(large) if self._queue_runs else []

        def loss_fn(weight: Tensor | None) -> Tensor:
            return self.loss(scores, codes, list(range(self.large_crops)), weight)

        return StepOutput(h[0], batch["label"], batch["index"], loss_fn=loss_fn)

    def _crops(self, batch: Batch) -> list[Tensor]:
        """All views, large crops first.

        Raises:
            ValueError: too few views, or ``large_crops`` takes in smaller ones or leaves out a larger one.
        """
        views = self.views(batch, max(2, self.large_crops))
        sizes = [(view.shape[-2], view.shape[-1]) for view in views]
        if len(set(sizes[: self.large_crops])) > 1 or max(sizes) > sizes[0]:
            raise ValueError(
                f"large_crops is {self.large_crops}, but the views of an image have "
                f"{', '.join(f'{h} x {w}' for h, w in sizes)} pixels: set model.init_args.large_crops to the "
                "number of large crops that data.init_args.train_view makes, which must come first."
            )
        return views

    @torch.no_grad()
    def codes(self, scores: Tensor, crop: int) -> Tensor:
        """Balanced codes ``(B, K)`` for the scores ``(B, K)`` of large crop number ``crop``."""
        rows = self._queue_rows(crop)
        if rows is not None:
            scores = torch.cat([rows.float() @ self.prototypes.weight.float().T, scores])
        all_codes = sinkhorn(scores, self.epsilon, self.sinkhorn_iterations)
        return all_codes if rows is None else all_codes[len(rows) :]

    @property
    def _queue_runs(self) -> bool:
        return len(self.queues) > 0 and self.current_epoch >= self.queue_start_epoch

    def _queue_rows(self, crop: int) -> Tensor | None:
        """This rank's share of a full queue: each row on one rank, whichever, for Sinkhorn is synced."""
        if not self._queue_runs or len(self._rings()[crop]) < self._rings()[crop].size:
            return None
        return self._rings()[crop].get()[0][distributed.rank() :: distributed.world_size()]

    def _rings(self) -> list[FeatureQueue]:
        return [queue for queue in self.queues if isinstance(queue, FeatureQueue)]

    def on_after_backward(self) -> None:
        """Only now do the projections enter the queues."""
        super().on_after_backward()
        rows, self._new_rows = self._new_rows, []
        keep = self.kept_rows() if rows else None
        for queue, new in zip(self._rings(), rows, strict=False):
            queue.enqueue(distributed.gather(new), keep=keep)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Frozen prototypes have no gradient at all, so that weight decay and momentum skip them too."""
        super().on_before_optimizer_step(optimizer)
        if self.current_epoch < self.freeze_epochs:
            self.prototypes.weight.grad = None
