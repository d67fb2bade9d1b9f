"""Backbones: any timm name, or our small nets, as feature extractors."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import timm
from timm.models.resnet import ResNet
from torch import nn

from lightning_nrml.models import small as small  # registers conv4 with timm

Stem = Literal["imagenet", "cifar"]


def create_backbone(
    name: str,
    in_channels: int = 3,
    pretrained: bool = False,
    kwargs: dict[str, Any] | None = None,
    stem: Stem = "imagenet",
) -> tuple[nn.Module, int]:
    """Build a timm model without its classifier.

    Args:
        name: any name of ``timm.list_models()``, or ``conv4``.
        in_channels: number of image bands.
        pretrained: load timm's weights (needs network or a local cache).
        kwargs: passed to the model, e.g. ``{"img_size": 64}`` for a ViT.
        stem: ``cifar`` gives a ResNet a first convolution of 3 x 3 and stride 1 and takes its max-pooling
            away, as is usual for images of 32 x 32 pixels.

    Returns:
        The model, ``(B, in_channels, H, W) -> (B, num_features)``, and ``num_features``.

    Raises:
        ValueError: unknown name; names the nearest ones. Or a ``stem`` that the model cannot have.
    """
    if not timm.is_model(name.split(".")[0]) and ":" not in name:
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise ValueError(f"backbone '{name}' is not a timm model.{hint}")
    try:
        model: Any = timm.create_model(
            name, pretrained=pretrained, in_chans=in_channels, num_classes=0, **(kwargs or {})
        )
    except TypeError as error:
        raise ValueError(f"backbone_kwargs {kwargs} do not fit backbone '{name}': {error}") from error
    except OSError as error:
        if not pretrained:
            raise
        raise ValueError(
            f"the pretrained weights of '{name}' are neither cached nor reachable; connect to the network "
            "once, set pretrained to false, or name a file with init_weights"
        ) from error
    if stem != "imagenet":
        _set_cifar_stem(model, name, stem, pretrained)
    features = getattr(model, "head_hidden_size", None) or model.num_features
    return model, int(features)


def _set_cifar_stem(model: Any, name: str, stem: str, pretrained: bool) -> None:
    if stem != "cifar":
        raise ValueError(f"stem must be 'imagenet' or 'cifar', got '{stem}'.")
    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise ValueError(
            f"stem 'cifar' is for ResNets with a single first convolution such as resnet18, not for "
            f"'{name}': leave stem at 'imagenet' (and for a ViT set backbone_kwargs.img_size and patch_size)."
        )
    if pretrained:
        raise ValueError(
            "stem 'cifar' has no pretrained weights: set pretrained to false, or stem to 'imagenet'."
        )
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=old.bias is not None)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
