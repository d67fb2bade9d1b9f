"""RCML: robust collaborative learning for multi-label data."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from lightning_nrml.losses import RCMLLoss
from lightning_nrml.losses.rcml import keep_rate
from lightning_nrml.modules.two_networks import TwoNetworks
from lightning_nrml.types import Batch, StepOutput


class RCML(TwoNetworks):
    """Two networks; each chooses the samples that the other one learns from.

    A sample is chosen if its labels agree with the ranking of the predictions; the two networks' outputs are
    drawn together and their early features driven apart. No noise model and no warm-up. Where the authors
    take two SGD optimisers, one optimiser takes the sum of the losses: the gradients are the same.

    Source: Aksoy, Ravanbakhsh, Demir, "Multi-Label Noise Robust Collaborative Learning for Remote Sensing
    Image Classification", IEEE TNNLS 2022, arXiv 2012.10715; see
    :class:`~lightning_nrml.losses.RCMLLoss`. ``flip_rate`` adds the flipping of labels of the earlier version
    (CCML); then ``train/flipped`` tells how many labels of a batch were turned.

    Args:
        backbone: see :class:`TwoNetworks`, as are all arguments not listed here.
        keep_start, keep_end: share of the batch that is kept, in the first epoch and at the end, see
            :func:`~lightning_nrml.losses.rcml.keep_rate`.
        feature_layer: part of the backbone whose output is the early feature, such as ``layer1``; default:
            the second stage that timm lists, which in a ResNet is ``layer1``.
        flip_rate: share of the samples in which both networks suspect the same label that get it turned, in
            [0, 1], see :func:`~lightning_nrml.losses.rcml.flip_suspects`; 0 = never.
        flip_start: first epoch in which labels are turned.
        alpha, beta, disparity_weight, consistency_weight, sigma, swap: see the loss.

    Raises:
        ValueError: a keep rate is outside (0, 1], ``flip_rate`` outside [0, 1], or there is no such layer.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        num_classes: int | None = None,
        keep_start: float = 0.6,
        keep_end: float = 0.6,
        feature_layer: str | None = None,
        alpha: float = 0.2,
        beta: float = 0.8,
        disparity_weight: float = 1.0,
        consistency_weight: float = 0.1,
        sigma: float = 10000.0,
        swap: bool = True,
        flip_rate: float = 0.0,
        flip_start: int = 0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= flip_rate <= 1 or flip_start < 0:
            raise ValueError(
                f"flip_rate ({flip_rate}) must lie in [0, 1], and flip_start ({flip_start}) must not be "
                "negative."
            )
        for name, value in (("keep_start", keep_start), ("keep_end", keep_end)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {value}.")
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, num_classes, **kwargs)
        self.loss = RCMLLoss(alpha, beta, disparity_weight, consistency_weight, sigma, swap)
        self.keep_start, self.keep_end = keep_start, keep_end
        self.flip_rate, self.flip_start = flip_rate, flip_start
        self.feature_layer = find_layer(self.backbone, feature_layer) if disparity_weight else None

    @property
    def keep_rate(self) -> float:
        """Share of the batch that is kept in this epoch."""
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            if self.keep_start != self.keep_end:
                raise ValueError(
                    "keep_start and keep_end differ: set trainer.max_epochs, which the rate follows."
                )
            return self.keep_end
        return keep_rate(self.current_epoch, epochs, self.keep_start, self.keep_end)

    def step(self, batch: Batch) -> StepOutput:
        """Both networks' logits and early features; the loss is evaluated after the filters have spoken."""
        features, early = with_layer(self.backbone, self.feature_layer, batch["image"])
        features_2, early_2 = with_layer(self.backbone_2, self.feature_layer, batch["image"])
        z1, z2, label = self.classifier(features), self.classifier_2(features_2), batch["label"]

        flip = self.flip_rate if self.current_epoch >= self.flip_start else 0.0
        logged = ["loss", "loss_1", "loss_2", "consistency", "disparity"]
        logged += ["flipped"] if self.flip_rate else []

        def loss_fn(weight: Tensor | None) -> dict[str, Tensor]:
            parts = self.loss.terms(z1, z2, label, early, early_2, self.keep_rate, weight, flip)
            return {k: parts[k] for k in logged}

        return StepOutput(features, label, batch["index"], logits=(z1 + z2) / 2, loss_fn=loss_fn)


def find_layer(backbone: nn.Module, name: str | None) -> str:
    """Name of a part of the backbone; ``None`` = the second stage that timm lists.

    Raises:
        ValueError: there is none; names the nearest ones.
    """
    layers = [n for n, _ in backbone.named_modules() if n]
    if name is None:
        info: Any = getattr(backbone, "feature_info", None) or []
        found = info[1].get("module") if len(info) > 1 else None
        if found not in layers:
            raise ValueError(
                f"This backbone lists no stages: set feature_layer to one of {', '.join(layers[:8])}."
            )
        return str(found)
    if name not in layers:
        near = difflib.get_close_matches(name, layers, n=3, cutoff=0.3) or layers[:3]
        raise ValueError(f"feature_layer '{name}' is no part of the backbone; nearest: {', '.join(near)}.")
    return name


def with_layer(backbone: nn.Module, layer: str | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The backbone's features, and the output of one of its parts on the way."""
    if layer is None:
        return backbone(x), None
    seen: list[Tensor] = []
    handle = backbone.get_submodule(layer).register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        features = backbone(x)
    finally:
        handle.remove()
    return features, seen[-1]
