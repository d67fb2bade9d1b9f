"""Small convolutional nets for small images, registered with timm beside its zoo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Strided 3x3 convolutions with batch norm and ReLU, flattened: the classic few-shot net.

    Args:
        in_chans: input channels.
        widths: output channels of each block.
        strides: stride of each block.
        input_size: side of the square input, which fixes ``num_features``.
        num_classes: 0 for features ``(B, num_features)``, else logits ``(B, num_classes)``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        widths: Sequence[int] = (64, 128, 128, 128),
        strides: Sequence[int] = (2, 2, 2, 2),
        input_size: int = 28,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if len(widths) != len(strides):
            raise ValueError(
                f"`widths` has {len(widths)} entries and `strides` has {len(strides)}: "
                "give one stride per block."
            )
        layers: list[nn.Module] = []
        channels, side = in_chans, input_size
        for width, stride in zip(widths, strides, strict=True):
            layers += [
                nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels, side = width, (side + stride - 1) // stride
        self.body = nn.Sequential(*layers)
        self.num_features = channels * side * side
        self.num_classes = num_classes
        self.input_size = input_size
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, S, S) -> (B, width, side, side)``."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_chans, S, S) -> (B, num_features or num_classes)``."""
        if x.shape[-1] != self.input_size or x.shape[-2] != self.input_size:
            raise ValueError(
                f"conv4 was built for {self.input_size} x {self.input_size} images and got "
                f"{x.shape[-2]} x {x.shape[-1]}: set backbone_kwargs.input_size to the size of the views."
            )
        out: Tensor = self.fc(torch.flatten(self.forward_features(x), 1))
        return out


class Pixels(nn.Module):
    """The image itself, flattened: nothing to learn, the floor of every comparison.

    Args:
        in_chans: channels.
        input_size: side of the square input, which fixes ``num_features``.
    """

    def __init__(self, in_chans: int = 3, input_size: int = 28) -> None:
        super().__init__()
        self.num_features = in_chans * input_size * input_size

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_chans, S, S) -> (B, num_features)``."""
        return torch.flatten(x, 1)


@register_model
def pixels(
    pretrained: bool = False, in_chans: int = 3, input_size: int = 28, num_classes: int = 0, **_: Any
) -> Pixels:
    """:class:`Pixels` under timm's factory."""
    if pretrained or num_classes:
        raise ValueError("pixels has neither weights nor a classifier: set pretrained to false.")
    return Pixels(in_chans, input_size)


@register_model
def conv4(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """:class:`ConvNet` under timm's factory; there are no pretrained weights."""
    if pretrained:
        raise ValueError("conv4 has no pretrained weights: set pretrained to false.")
    # timm's factory adds its own, which mean nothing here
    return ConvNet(**{k: v for k, v in kwargs.items() if not k.startswith(("pretrained_", "cache_dir"))})
