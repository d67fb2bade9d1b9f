"""Ready-made views. The classes serve YAML (``class_path`` / ``init_args``), the functions serve Python."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lightning_nrml.data.views.base import ViewOp, Views
from lightning_nrml.data.views.color import BandJitter, ColorJitter, GaussianBlur, Grayscale, Solarize
from lightning_nrml.data.views.geometry import (
    HorizontalFlip,
    Interpolation,
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


def contrastive_ops(
    size: int,
    crop_scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    vertical_flip: float,
    jitter: tuple[float, float, float, float],
    jitter_p: float,
    grayscale: float,
    blur: float,
    blur_kernel: int | None,
    blur_sigma: tuple[float, float],
    solarize: float,
    interpolation: Interpolation,
) -> list[ViewOp]:
    """The operations shared by the self-supervised recipes: crop, flip, colour, grey, blur, solarise.

    Arguments are those of :class:`SimCLRViews`; ``solarize`` is the probability of solarisation.
    """
    ops: list[ViewOp] = [RandomResizedCrop(size, crop_scale, ratio, interpolation)]
    if flip > 0:
        ops.append(HorizontalFlip(flip))
    if vertical_flip > 0:
        ops.append(VerticalFlip(vertical_flip))
    if jitter_p > 0 and max(jitter) > 0:
        ops.append(ColorJitter(*jitter, p=jitter_p))
    if grayscale > 0:
        ops.append(Grayscale(grayscale))
    if blur > 0:
        ops.append(GaussianBlur(blur_kernel, blur_sigma, blur))
    if solarize > 0:
        ops.append(Solarize(p=solarize))
    return ops


class SimCLRViews(Views):
    """Views from one law, as in SimCLR (Chen et al. 2020, appendix A; official ``data_util.py``).

    The CIFAR variant of the paper is ``strength=0.5, blur=0``. Grey-scale and multi-band images work
    too; see :class:`.ColorJitter` and :class:`.Grayscale` for what colour means there.

    Args:
        size: side of the square output in pixels.
        num_views: how many views of each image.
        crop_scale: range of the share of the area kept by the crop.
        ratio: range of the crop's width / height, uniform in the logarithm.
        flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip.
        strength: scales the colour jitter (.8, .8, .8, .2).
        jitter_p: probability of the colour jitter.
        grayscale: probability of greyscale.
        blur: probability of the Gaussian blur.
        blur_kernel: taps of the blur, odd; ``None`` = a tenth of the size.
        blur_sigma: range of the blur's standard deviation in pixels.
        interpolation: of the crop, ``"bilinear"`` or ``"bicubic"``.
        mean: per-channel mean in units of [0, 1]; ``None`` = no normalisation (as in the official code).
        std: per-channel standard deviation.
    """

    def __init__(
        self,
        size: int,
        num_views: int = 2,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        strength: float = 1.0,
        jitter_p: float = 0.8,
        grayscale: float = 0.2,
        blur: float = 0.5,
        blur_kernel: int | None = None,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        interpolation: Interpolation = "bicubic",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        jitter = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        views = [
            contrastive_ops(
                size,
                crop_scale,
                ratio,
                flip,
                vertical_flip,
                jitter,
                jitter_p,
                grayscale,
                blur,
                blur_kernel,
                blur_sigma,
                0.0,
                interpolation,
            )
            for _ in range(num_views)
        ]
        super().__init__(views, mean, std)


class MoCoViews(Views):
    """Views from one law, as in MoCo v2 ("aug-plus", Chen et al. 2020b; official ``main_moco.py``).

    Also the law of MoCHi. CIFAR variant: ``blur=0``. Arguments as in :class:`SimCLRViews`, but for

    Args:
        jitter: brightness, contrast, saturation, hue of the colour jitter.
        blur_kernel: 13 taps reach three standard deviations of the widest blur (Pillow, used by the
            official code, does not cut the kernel).
    """

    def __init__(
        self,
        size: int,
        num_views: int = 2,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
        jitter_p: float = 0.8,
        grayscale: float = 0.2,
        blur: float = 0.5,
        blur_kernel: int | None = 13,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        interpolation: Interpolation = "bilinear",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        views = [
            contrastive_ops(
                size,
                crop_scale,
                ratio,
                flip,
                vertical_flip,
                jitter,
                jitter_p,
                grayscale,
                blur,
                blur_kernel,
                blur_sigma,
                0.0,
                interpolation,
            )
            for _ in range(num_views)
        ]
        super().__init__(views, mean, std)


class BYOLViews(Views):
    """Two views from two laws, as in BYOL (Grill et al. 2020, appendix B, table 6).

    View 1 is always blurred, view 2 rarely blurred and sometimes solarised. Brightness multiplies, as in
    torchvision; the official code adds. CIFAR variant of the peers: ``blur=(0, 0)``. Arguments as in
    :class:`SimCLRViews`, but for

    Args:
        jitter: brightness, contrast, saturation, hue of the colour jitter.
        blur: probability of the blur in view 1 and view 2.
        solarize: probability of solarisation (threshold .5) in view 1 and view 2.
    """

    def __init__(
        self,
        size: int,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_p: float = 0.8,
        grayscale: float = 0.2,
        blur: tuple[float, float] = (1.0, 0.1),
        blur_kernel: int | None = None,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize: tuple[float, float] = (0.0, 0.2),
        interpolation: Interpolation = "bicubic",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        views = [
            contrastive_ops(
                size,
                crop_scale,
                ratio,
                flip,
                vertical_flip,
                jitter,
                jitter_p,
                grayscale,
                blur[i],
                blur_kernel,
                blur_sigma,
                solarize[i],
                interpolation,
            )
            for i in range(2)
        ]
        super().__init__(views, mean, std)


class MultiCropViews(Views):
    """A few large and many small crops, as in SwAV (Caron et al. 2020, section 3.3 and appendix A.2).

    The large crops come first in the output. Two crops as in SimCLR: ``small_crops=0,
    crop_scale=(.08, 1)``. Arguments as in :class:`SimCLRViews`, but for

    Args:
        size: side of the large crops in pixels.
        large_crops: how many large crops.
        small_size: side of the small crops in pixels (for CIFAR e.g. size 32, small_size 16).
        small_crops: how many small crops; 0 switches them off.
        crop_scale: share of the area in the large crops.
        small_scale: share of the area in the small crops.
        jitter: brightness, contrast, saturation, hue of the colour jitter.
        blur_kernel: see :class:`MoCoViews`.
    """

    def __init__(
        self,
        size: int = 224,
        large_crops: int = 2,
        small_size: int = 96,
        small_crops: int = 6,
        crop_scale: tuple[float, float] = (0.14, 1.0),
        small_scale: tuple[float, float] = (0.05, 0.14),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2),
        jitter_p: float = 0.8,
        grayscale: float = 0.2,
        blur: float = 0.5,
        blur_kernel: int | None = 13,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        interpolation: Interpolation = "bilinear",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        crops = [(size, crop_scale)] * large_crops + [(small_size, small_scale)] * small_crops
        views = [
            contrastive_ops(
                side,
                area,
                ratio,
                flip,
                vertical_flip,
                jitter,
                jitter_p,
                grayscale,
                blur,
                blur_kernel,
                blur_sigma,
                0.0,
                interpolation,
            )
            for side, area in crops
        ]
        super().__init__(views, mean, std)


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


eval_view = EvalView
metric_view = MetricView
simclr_views = SimCLRViews
moco_views = MoCoViews
byol_views = BYOLViews
multicrop_views = MultiCropViews


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
