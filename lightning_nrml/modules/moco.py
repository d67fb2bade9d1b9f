"""MoCo: contrast a query with its key against a queue of earlier keys."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.losses import MoCHiLoss
from lightning_nrml.memory import FeatureQueue
from lightning_nrml.models import MomentumTeacher, projector
from lightning_nrml.modules.base import mix_seed
from lightning_nrml.modules.self_supervised import TaughtModule
from lightning_nrml.types import Batch, StepOutput


class MoCo(TaughtModule):
    """MoCo-v2, "Improved Baselines with Momentum Contrastive Learning".

    Queries (view 1) come from the student, keys (view 2) from the momentum teacher; each query is told
    apart from the keys of earlier batches, of all ranks, in a queue. The queue starts with random unit
    rows, as in the official code, and takes the new keys only after the backward pass. Source: He et al.,
    CVPR 2020, arXiv 1911.05722, algorithm 1; Chen et al. 2020, arXiv 2003.04297.

    Images whose old keys are still in the queue are negatives of themselves: keep ``queue_size`` well
    below the size of the training set.

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        temperature: of the logits.
        queue_size: keys kept.
        projector_hidden: width of the projector's hidden layer; default the backbone's features.
        projector_dim: size of queries and keys.
        tau: momentum of the teacher.
        tau_schedule: ``constant``, as published, or ``cosine`` (to 1 at the last step).
        shuffle_bn: pass the keys through the teacher in another order over ranks and splits than the
            queries, so that batch statistics do not give the pairs away. Needs more than one rank or split.
        bn_splits: parts of a rank's batch that have batch statistics of their own, for queries and keys
            alike; gives one process what several ranks give.
    """

    made_anew: ClassVar[tuple[str, ...]] = ("teacher", "queue")

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        temperature: float = 0.2,
        queue_size: int = 65536,
        projector_hidden: int | None = None,
        projector_dim: int = 128,
        tau: float = 0.999,
        tau_schedule: Literal["cosine", "constant"] = "constant",
        shuffle_bn: bool = True,
        bn_splits: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone, backbone_kwargs, in_channels, pretrained, tau=tau, tau_schedule=tau_schedule, **kwargs
        )
        if bn_splits < 1:
            raise ValueError(f"bn_splits must be at least 1, got {bn_splits}.")
        self.projector = projector("moco", self.num_features, projector_hidden, projector_dim)
        self.teacher = MomentumTeacher(self.student)
        self.queue = FeatureQueue(queue_size, projector_dim, with_label=False)
        self.loss = MoCHiLoss(temperature, num_hard=0, num_mixed=0, num_query_mixed=0)
        self.shuffle_bn, self.bn_splits = shuffle_bn, bn_splits
        self._order_seed = 0
        self._new_keys: tuple[Tensor, Tensor] | None = None
        self._fill_queue()

    def _fill_queue(self) -> None:
        """Random unit rows from a seed of their own: equal on all ranks, whatever the global seed."""
        generator = torch.Generator().manual_seed(mix_seed(self.queue.size, self.queue.dim))
        rows = torch.randn(self.queue.size, self.queue.dim, generator=generator, dtype=torch.float32)
        self.queue.reset()
        self.queue.enqueue(F.normalize(rows, dim=1).to(self.queue.embedding))

    def start_over(self) -> None:
        """The teacher starts from the loaded weights, the queue from random rows."""
        super().start_over()
        self._fill_queue()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """As the base; also names the order of the keys, equal on all ranks and after a resume."""
        super().on_train_batch_start(batch, batch_idx)
        self._order_seed = mix_seed(self.current_epoch, batch_idx)

    def step(self, batch: Batch) -> StepOutput:
        """Queries with gradient, keys without."""
        view_q, view_k = self.views(batch)[:2]
        h = torch.cat([self.backbone(part) for part in self._splits(view_q)])
        q = F.normalize(self.projector(h).float(), dim=1)
        keys = self.keys(view_k)
        k = keys[distributed.own_rows([len(q)] * distributed.world_size())]
        self._new_keys = (keys, batch["index"])
        # A view of the queue: it is written only after the backward pass.
        queue = self.queue.get()[0]

        def loss_fn(weight: Tensor | None) -> Tensor:
            return self.contrast(q, k, queue, weight)

        return StepOutput(h, batch["label"], batch["index"], loss_fn=loss_fn)

    def contrast(self, q: Tensor, k: Tensor, queue: Tensor, weight: Tensor | None) -> Tensor:
        """The loss of ``q (B, D)`` with its keys ``k (B, D)`` against ``queue (K, D)``."""
        return self.loss(q, k, queue, weight=weight)

    @torch.no_grad()
    def keys(self, view: Tensor) -> Tensor:
        """Unit keys ``(W B, D)`` of all ranks, in rank order, encoded in shuffled order."""
        if not self.shuffle_bn or (distributed.world_size() == 1 and self.bn_splits == 1):
            return distributed.gather(self._encode(view))
        every = distributed.gather(view)
        generator = torch.Generator().manual_seed(self._order_seed)
        order = torch.randperm(len(every), generator=generator).to(view.device)
        mine = order[distributed.own_rows([len(view)] * distributed.world_size())]
        shuffled = distributed.gather(self._encode(every[mine]))
        return torch.empty_like(shuffled).index_copy_(0, order, shuffled)

    def _encode(self, view: Tensor) -> Tensor:
        rows = torch.cat([self.teacher(part) for part in self._splits(view)])
        return F.normalize(rows.float(), dim=1)

    def _splits(self, view: Tensor) -> tuple[Tensor, ...]:
        if len(view) % self.bn_splits:
            raise ValueError(
                f"bn_splits is {self.bn_splits}, which does not divide the batch of {len(view)} images: "
                "change one of them."
            )
        return view.chunk(self.bn_splits)

    def on_after_backward(self) -> None:
        """Only now do the new keys enter the queue: before, they would be negatives of themselves."""
        super().on_after_backward()
        new, self._new_keys = self._new_keys, None
        if new is not None:
            keys, index = new
            self.queue.enqueue(keys, index=distributed.gather(index), keep=self.kept_rows())
