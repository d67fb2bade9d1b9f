"""JoCoR for multi-label data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_nrml.losses import MultiLabelJoCoRLoss
from lightning_nrml.losses.multilabel_jocor import Choice
from lightning_nrml.modules.two_networks import TwoNetworks
from lightning_nrml.types import Batch, StepOutput


class JoCoR(TwoNetworks):
    """Two networks with one joint loss that drops what they do not fit or do not agree upon.

    Logs ``train/forget_rate``, and ``train/kept_positives``, the share of the given labels that the loss
    kept: with ``choose="entry"`` it falls first.

    Source: Wei et al., "Combating Noisy Labels by Agreement: A Joint Training Method with Co-Regularization",
    CVPR 2020, arXiv 2003.02752; see :class:`~lightning_nrml.losses.MultiLabelJoCoRLoss`.

    Args:
        backbone: see :class:`TwoNetworks`, as are all arguments not listed here.
        co_lambda, forget_rate, ramp_epochs, exponent, choose: see the loss.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        num_classes: int | None = None,
        co_lambda: float = 0.1,
        forget_rate: float = 0.2,
        ramp_epochs: int = 10,
        exponent: float = 1.0,
        choose: Choice = "sample",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, num_classes, **kwargs)
        self.loss = MultiLabelJoCoRLoss(co_lambda, forget_rate, ramp_epochs, exponent, choose)

    def step(self, batch: Batch) -> StepOutput:
        """Both networks' logits; the loss is evaluated after the filters have spoken."""
        features, features_2 = self.backbone(batch["image"]), self.backbone_2(batch["image"])
        z1, z2, label = self.classifier(features), self.classifier_2(features_2), batch["label"]

        def loss_fn(weight: Tensor | None) -> dict[str, Tensor]:
            rate = self.loss.rate(self.current_epoch)
            loss, kept = self.loss.terms(z1, z2, label, weight, rate)
            share = (kept & (label > 0)).sum() / (label > 0).sum().clamp(min=1)
            return {
                "loss": loss,
                "forget_rate": share.new_full((), rate, dtype=torch.float32),
                "kept_positives": share,
            }

        return StepOutput(features, label, batch["index"], logits=(z1 + z2) / 2, loss_fn=loss_fn)
