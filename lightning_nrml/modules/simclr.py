"""SimCLR: contrast two views of each image against all other images of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.losses import NTXentLoss
from lightning_nrml.models import projector
from lightning_nrml.modules.self_supervised import SelfSupervised
from lightning_nrml.types import Batch, StepOutput


class SimCLR(SelfSupervised):
    """SimCLR, "A Simple Framework for Contrastive Learning of Visual Representations".

    Two views of each image go through backbone and projector; the NT-Xent loss pulls them together and
    away from all other views of the batch, gathered over ranks. Source: Chen et al., ICML 2020,
    arXiv 2002.05709, section 2; the head is the official code's (three layers, batch norm after each).

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        temperature: 0.1 for ImageNet at batch 4096, 0.5 for CIFAR, 0.2 for small batches.
        projector_layers: linear layers of the projector (2 in the paper).
        projector_hidden: width of its hidden layers; default the backbone's features.
        projector_dim: size of the projection.
        joint_views: one pass over both views, as published (batch norm sees both); false = two passes.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        temperature: float = 0.5,
        projector_layers: int = 3,
        projector_hidden: int | None = None,
        projector_dim: int = 128,
        joint_views: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, **kwargs)
        self.projector = projector(
            "simclr", self.num_features, projector_hidden, projector_dim, projector_layers
        )
        self.loss = NTXentLoss(temperature)
        self.joint_views = joint_views

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """As the base.

        Raises:
            ValueError: the first batch holds one image over all ranks: nothing to be told apart from.
        """
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0 and len(batch["image"]) * distributed.world_size() < 2:
            raise ValueError(
                "SimCLR tells the images of a batch apart, but the batch holds 1 image: set "
                "data.init_args.batch_size to 2 or more (hundreds are usual)."
            )

    def step(self, batch: Batch) -> StepOutput:
        """Project the first two views."""
        views = self.views(batch)[:2]
        h = self.features(views, self.joint_views)
        if self.joint_views:
            z_a, z_b = self.projector(torch.cat(h)).chunk(2)
        else:
            z_a, z_b = (self.projector(rows) for rows in h)

        def loss_fn(weight: Tensor | None) -> Tensor:
            return self.loss(z_a, z_b, weight)

        return StepOutput(h[0], batch["label"], batch["index"], loss_fn=loss_fn)
