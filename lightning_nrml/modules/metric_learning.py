"""Supervised deep metric learning, with an optional cross-batch memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_nrml.losses import ContrastiveLoss, CrossBatchContrastiveLoss, Loss
from lightning_nrml.losses.base import unit_rows
from lightning_nrml.memory import FeatureQueue
from lightning_nrml.models import create_head, load_backbone
from lightning_nrml.models.heads import HeadName
from lightning_nrml.modules.arguments import as_loss
from lightning_nrml.modules.base import EmbeddingModule
from lightning_nrml.types import Batch, FilterContext, Selection, StepOutput


class MetricLearning(EmbeddingModule):
    """Backbone, embedding head and any loss on (embedding, label, weight).

    With ``memory_size > 0`` the embeddings of earlier batches serve as further partners (cross-batch
    memory, Wang et al., CVPR 2020, arXiv 1912.06798; the MCL loss of PRISM, CVPR 2021, eq. 9-10):
    total = loss(batch) + memory_weight * memory_loss(batch against memory). Rows that a filter drops
    take part in neither and never enter the memory.

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        embedding_dim: size of the embedding; ``head="none"`` takes the backbone's features.
        head: ``linear``, ``mlp`` or ``none``.
        num_classes: number of training classes (linked to the data by the command line); for losses that
            need it and were not told.
        loss: any :class:`~lightning_nrml.losses.Loss`; default ``ContrastiveLoss(0.5)``.
        memory_size: rows of the memory; 0 switches it off.
        memory_weight: weight of the memory loss, which is contrastive whatever ``loss`` is, and a sum over
            the pairs with the memory: at 1 it outweighs most batch losses by far. Our recipes use .05 to .1.
        memory_margin: negative margin of the memory loss.
        memory_start: optimiser steps before the memory loss counts (it fills from the start).
        backbone_ckpt: start the backbone alone from this file: a checkpoint of any module of this package
            (of self-supervised training, say) or a plain state dict, see
            :func:`lightning_nrml.models.load_backbone`. A resumed run does not read it.
    """

    made_anew: ClassVar[tuple[str, ...]] = ("memory",)

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        embedding_dim: int = 128,
        head: HeadName = "linear",
        num_classes: int | None = None,
        loss: Loss | None = None,
        memory_size: int = 0,
        memory_weight: float = 1.0,
        memory_margin: float = 0.5,
        memory_start: int = 0,
        backbone_ckpt: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value, least in (("embedding_dim", embedding_dim, 1), ("memory_size", memory_size, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}: it must be {least} or more.")
        if backbone_ckpt and kwargs.get("init_weights"):
            raise ValueError(
                "Give backbone_ckpt (the backbone alone) or init_weights (all that fits), not both."
            )
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, **kwargs)
        self.head = create_head(head, self.num_features, embedding_dim)
        self.loss: Loss = ContrastiveLoss() if loss is None else as_loss(loss)
        self.loss.set_sizes(num_classes, embedding_dim)
        self.memory = FeatureQueue(memory_size, embedding_dim) if memory_size else None
        self.memory_loss = CrossBatchContrastiveLoss(memory_margin)
        self.memory_weight, self.memory_start = memory_weight, memory_start
        self.num_classes = num_classes
        self.backbone_ckpt = backbone_ckpt
        self._embedding_dim = embedding_dim

    @property
    def embedding_dim(self) -> int:
        """Columns of the embedding."""
        return self._embedding_dim

    @property
    def has_memory(self) -> bool:
        """True if a cross-batch memory is used."""
        return self.memory is not None

    def loss_parameters(self) -> Iterable[nn.Parameter]:
        """Class weights or proxies of the loss, if it has any."""
        return self.loss.parameters()

    def on_fit_start(self) -> None:
        """As the base; the backbone starts from ``backbone_ckpt``, unless the run resumes."""
        super().on_fit_start()
        if self.backbone_ckpt and self.trainer.ckpt_path is None:
            load_backbone(self.backbone, self.backbone_ckpt)

    def embed(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, embedding_dim)`` unit rows."""
        return unit_rows(self.head(self.backbone(x)).float())

    def encoder(self) -> nn.Module:
        """Backbone and head."""
        return nn.Sequential(OrderedDict(backbone=self.backbone, head=self.head))

    def step(self, batch: Batch) -> StepOutput:
        """Embed the batch; the loss is evaluated after the filters have spoken."""
        z, label = self.head(self.backbone(batch["image"])), batch["label"]
        logits = self.loss.logits(z)

        def loss_fn(weight: Tensor | None, *pairs: Tensor) -> dict[str, Tensor]:
            batch_loss = self.loss(z, label, weight, *pairs)
            if self.memory is None or self.global_step < self.memory_start:
                return {"loss": batch_loss}
            kept_rows, kept_label = self.memory.get()
            memory_loss = self.memory_loss(z, label, kept_rows, kept_label, weight)
            total = batch_loss + self.memory_weight * memory_loss
            return {"loss": total, "batch_loss": batch_loss, "memory_loss": memory_loss}

        return StepOutput(
            z,
            label,
            batch["index"],
            logits=logits,
            loss_fn=loss_fn,
            per_sample_loss=self.loss.per_sample(z, label) if self.filters.wants("per_sample_loss") else None,
            proxies=self.loss.proxies(),
            pair_loss_fn=loss_fn if self.loss.takes_pairs else None,
        )

    def remember(self, ctx: FilterContext, selection: Selection) -> None:
        """Enqueue the kept rows of the gathered batch."""
        assert self.memory is not None or not self.has_memory
        if self.memory is not None:
            self.memory.enqueue(ctx.embedding, ctx.label, ctx.index, selection.keep)
