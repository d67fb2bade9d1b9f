"""BYOL: predict a momentum teacher's projection of the other view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import BYOLLoss
from lightning_nrml.models import MomentumTeacher, projector
from lightning_nrml.modules.self_supervised import TaughtModule
from lightning_nrml.types import Batch, StepOutput


class BYOL(TaughtModule):
    """BYOL, "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning".

    Online net: backbone, projector, predictor; the teacher has no predictor. Both see both views, each in
    a pass of its own; loss = mean over the batch of (2 - 2 cos) summed over both directions, 0 to 8.
    Source: Grill et al., NeurIPS 2020, arXiv 2006.07733, section 3. ``train/output_std`` tells a collapse:
    it is near 1 for spread-out predictions and falls to 0.

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        projector_hidden: width of the hidden layer of projector and predictor.
        projector_dim: size of the projection.
        tau: momentum of the teacher at the start (.99 for 300 epochs, .996 for 1000).
        tau_schedule: ``cosine`` (to 1 at the last step) or ``constant``.
        joint_views: one pass over both views instead of the published one per view (changes batch norm).
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        projector_hidden: int = 4096,
        projector_dim: int = 256,
        joint_views: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, **kwargs)
        self.projector = projector("byol", self.num_features, projector_hidden, projector_dim)
        self.predictor = projector("byol", projector_dim, projector_hidden, projector_dim)
        self.teacher = MomentumTeacher(self.student)
        self.loss = BYOLLoss()
        self.joint_views = joint_views

    def step(self, batch: Batch) -> StepOutput:
        """Predictions of the online net and projections of the teacher for the first two views."""
        views = self.views(batch)[:2]
        h = self.features(views, self.joint_views)
        if self.joint_views:
            p_a, p_b = self.predictor(self.projector(torch.cat(h))).chunk(2)
            t_a, t_b = self.teacher(torch.cat(views)).chunk(2)
        else:
            p_a, p_b = (self.predictor(self.projector(rows)) for rows in h)
            t_a, t_b = (self.teacher(view) for view in views)

        def loss_fn(weight: Tensor | None) -> dict[str, Tensor]:
            return {
                "loss": self.loss(p_a, p_b, t_a, t_b, weight),
                "output_std": spread(p_a),
                "tau": p_a.new_full((), self.current_tau, dtype=torch.float32),
            }

        return StepOutput(h[0], batch["label"], batch["index"], loss_fn=loss_fn)


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Standard deviation of the coordinates of unit rows times sqrt(D): about 1 is healthy, 0 a collapse."""
    rows = F.normalize(z.float(), dim=1)
    return rows.std(dim=0, unbiased=False).mean() * rows.shape[1] ** 0.5
