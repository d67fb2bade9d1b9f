"""Two networks trained on the same batches."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml.models import create_backbone
from lightning_nrml.models.backbone import Stem
from lightning_nrml.modules.multilabel import MultiLabelModule

Evaluate = Literal["mean", "first", "second"]


class TwoNetworks(MultiLabelModule):
    """A second backbone and classifier beside the first, with start values of their own.

    Evaluation returns the probability that ``evaluate`` names, and those of both networks
    (``probability_1``, ``probability_2``), so that the better one can be chosen on the *validation* split.

    Args:
        backbone: see :class:`MultiLabelModule`, as are all arguments not listed here.
        evaluate: ``mean`` of both probabilities, or the ``first`` or ``second`` network alone; its backbone
            (the first one's for ``mean``) also gives the embedding.
        stem: of both networks, see :func:`lightning_nrml.models.create_backbone`.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        num_classes: int | None = None,
        evaluate: Evaluate = "mean",
        stem: Stem = "imagenet",
        **kwargs: Any,
    ) -> None:
        if evaluate not in ("mean", "first", "second"):
            raise ValueError(f"evaluate is '{evaluate}': choose mean, first or second.")
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, num_classes, stem=stem, **kwargs)
        # drawn after the first: other values, and the same on all ranks
        self.backbone_2, _ = create_backbone(backbone, in_channels, pretrained, backbone_kwargs, stem)
        self.classifier_2 = nn.Linear(self.num_features, self.num_classes)
        self.evaluate: Evaluate = evaluate

    def setup(self, stage: str) -> None:
        """Apply memory format and compilation to the second network, too."""
        super().setup(stage)
        if self.channels_last:
            self.backbone_2.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile_backbone and stage == "fit":
            self.backbone_2.compile()

    def start_from(self, path: str) -> set[str]:
        """Weights of one backbone serve both networks; those of two networks go to each its own."""
        names = super().start_from(path)
        if not any(name.startswith("backbone_2.") for name in names):
            self.backbone_2.load_state_dict(self.backbone.state_dict())
        return names

    def predictions(self, x: Tensor) -> dict[str, Tensor]:
        """``embedding (B, D)`` of unit rows and the three probabilities ``(B, L)``."""
        features, features_2 = self.backbone(x), self.backbone_2(x)
        p1 = self.classifier(features).float().sigmoid()
        p2 = self.classifier_2(features_2).float().sigmoid()
        chosen = {"mean": (p1 + p2) / 2, "first": p1, "second": p2}[self.evaluate]
        own = features_2 if self.evaluate == "second" else features
        return {
            "embedding": F.normalize(own.float(), dim=1),
            "probability": chosen,
            "probability_1": p1,
            "probability_2": p2,
        }

    def embed(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, embedding_dim)`` unit rows of the network that is evaluated."""
        return F.normalize(self.to_backbone()(x).float(), dim=1)

    def to_backbone(self) -> nn.Module:
        """The backbone that ``evaluate`` names (the first one for ``mean``)."""
        return self.backbone_2 if self.evaluate == "second" else self.backbone
