"""Ready-made views. The classes serve YAML (``class_path`` / ``init_args``), the functions serve Python."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lightning_nrml.data.views.base import ViewOp, Views
from lightning_nrml.data.views.color import BandJitter, ColorJitter
from lightning_nrml.data.views.geometry import (
    HorizontalFlip,
    RandomAffine,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    VerticalFlip,
)


class EvalView(Views):
    """One deterministic view: resize and normalise.

    Args:
        size: side of the square output in pixels.
        mean: per-channel mean in units of [0, 1]; ``None`` = no normalisation.
        std: per-channel standard deviation.
        interpolation: ``"bilinear"``, ``"bicubic"`` (antialiased) or ``"area"``.
        center_fraction: share of each side that is kept before the resize (ImageNet habit: .875).
    """

    def __init__(
        self,
        size: int,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        interpolation: Literal["bilinear", "bicubic", "area"] = "bilinear",
        center_fraction: float = 1.0,
    ) -> None:
        super().__init__([[Resize(size, interpolation, center_fraction)]], mean, std)


class MetricView(Views):
    """One training view for supervised metric learning; every part can be switched off.

    Order: crop (or plain resize), flips, affine map, colour jitter, gain / contrast / shift / noise,
    erasing, normalisation.

    Args:
        size: side of the square output in pixels.
        crop_scale: range of the share of the area kept by the crop; ``None`` = resize without a crop.
        ratio: range of the crop's width / height, uniform in the logarithm.
        flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip.
        degrees: rotation in [-degrees, degrees].
        scale: range of the magnification, e.g. (.85, 1.15); ``None`` = 1.
        shear: horizontal shear coefficient in [-shear, shear].
        translate: shift in [-translate, translate] times the side.
        fill: value of pixels from outside the image.
        brightness: value is multiplied by U(1 - brightness, 1 + brightness).
        contrast: stretch about each band's mean by U(1 - contrast, 1 + contrast).
        shift: U(-shift, shift) is added to the value.
        noise: standard deviation of Gaussian pixel noise.
        per_band: draw brightness, contrast and shift for each band instead of once per sample.
        saturation: half-width of the saturation factor (see :class:`.ColorJitter`).
        hue: half-width of the hue shift in turns.
        erasing: probability of a random erased rectangle.
        mean: per-channel mean in units of [0, 1]; ``None`` = no normalisation.
        std: per-channel standard deviation.
        interpolation: ``"bilinear"`` or ``"bicubic"``; ``"area"`` too where there is no crop.
    """

    def __init__(
        self,
        size: int,
        crop_scale: tuple[float, float] | None = (0.4, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        degrees: float = 0.0,
        scale: tuple[float, float] | None = None,
        shear: float = 0.0,
        translate: float = 0.0,
        fill: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        shift: float = 0.0,
        noise: float = 0.0,
        per_band: bool = False,
        saturation: float = 0.0,
        hue: float = 0.0,
        erasing: float = 0.0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        interpolation: Literal["bilinear", "bicubic", "area"] = "bilinear",
    ) -> None:
        ops: list[ViewOp] = []
        if crop_scale is None:
            ops.append(Resize(size, interpolation))
        elif interpolation == "area":
            raise ValueError("interpolation='area' needs crop_scale=None; crops are bilinear or bicubic.")
        else:
            ops.append(RandomResizedCrop(size, crop_scale, ratio, interpolation))
        if flip > 0:
            ops.append(HorizontalFlip(flip))
        if vertical_flip > 0:
            ops.append(VerticalFlip(vertical_flip))
        if degrees > 0 or scale is not None or shear > 0 or translate > 0:
            ops.append(RandomAffine(degrees, scale, shear, translate, fill))
        if saturation > 0 or hue > 0:
            ops.append(ColorJitter(saturation=saturation, hue=hue, p=1.0))
        if brightness > 0 or contrast > 0 or shift > 0 or noise > 0:
            ops.append(BandJitter(brightness, contrast, shift, noise, per_band))
        if erasing > 0:
            ops.append(RandomErasing(erasing))
        super().__init__([ops], mean, std)


class InsCLRViews(MetricView):
    """An augmented view to learn from, and the image as it is to mine with (InsCLR's "impr" stage).

    Published: ``crop_scale=(.75, 1)`` at 224 pixels (base stage; its upper end of 1.33 can never be met),
    ``(.4, 1)`` at 448 with ``plain_size=512`` (impr). Other arguments as in :class:`MetricView`.

    Args:
        size: side of the augmented view in pixels.
        plain_size: side of the second view; default ``size``.
        crop_scale: range of the share of the area kept by the crop; ``None`` = resize without a crop.
    """

    def __init__(
        self,
        size: int,
        plain_size: int | None = None,
        crop_scale: tuple[float, float] | None = (0.75, 1.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(size, crop_scale, **kwargs)
        self.views.append(nn.ModuleList([Resize(plain_size or size, "bilinear")]))


class EACViews(Views):
    """The image, and its mirror image, each with an erased rectangle of its own, for EAC.

    As in the official code for noisy labels (Zhang et al., ECCV 2022, arXiv 2207.10299): half of the images
    get Gaussian pixel noise in the first view; both views erase with probability ``erasing``. There is no
    crop or turn, because the attention of both views is compared place by place. What is erased becomes the
    average of ``mean`` over the channels, which is near 0 after normalisation.

    Args:
        size: side of the square output in pixels.
        erasing: probability of an erased rectangle, in each view.
        erasing_scale: range of its share of the area.
        noise: standard deviation of the pixel noise, in units of [0, 1]; the official one is sqrt(30) / 255.
        mean: per-channel mean in units of [0, 1]; ``None`` = no normalisation.
        std: per-channel standard deviation.
    """

    def __init__(
        self,
        size: int,
        erasing: float = 0.5,
        erasing_scale: tuple[float, float] = (0.02, 0.25),
        noise: float = 0.0215,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        value = sum(mean) / len(mean) if mean else 0.0
        plain: list[ViewOp] = [Resize(size)]
        mirrored: list[ViewOp] = [Resize(size), HorizontalFlip(1.0)]
        if noise > 0:
            plain.append(BandJitter(noise=noise, p=0.5))
        for ops in (plain, mirrored):
            if erasing > 0:
                ops.append(RandomErasing(erasing, erasing_scale, value=value))
        super().__init__([plain, mirrored], mean, std)


eval_view = EvalView
metric_view = MetricView
