"""Views of the self-supervised methods, with each paper's numbers."""

from __future__ import annotations

from lightning_nrml.data.views.base import ViewOp, Views
from lightning_nrml.data.views.color import ColorJitter, GaussianBlur, Grayscale, Solarize
from lightning_nrml.data.views.geometry import HorizontalFlip, Interpolation, RandomResizedCrop, VerticalFlip


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

    Raises:
        ValueError: the blur's kernel is too wide for the crop.
    """
    if blur > 0 and blur_kernel is not None and blur_kernel // 2 >= size:
        raise ValueError(
            f"blur_kernel is {blur_kernel}, too wide for crops of {size} pixels: give at most "
            f"{2 * size - 1}, None (a tenth of the size), or blur 0."
        )
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
                size, crop_scale, ratio, flip, vertical_flip,
                jitter, jitter_p, grayscale, blur, blur_kernel, blur_sigma, 0.0, interpolation,
            )
            for _ in range(num_views)
        ]  # fmt: skip
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
                size, crop_scale, ratio, flip, vertical_flip,
                jitter, jitter_p, grayscale, blur, blur_kernel, blur_sigma, 0.0, interpolation,
            )
            for _ in range(num_views)
        ]  # fmt: skip
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
                size, crop_scale, ratio, flip, vertical_flip,
                jitter, jitter_p, grayscale, blur[i], blur_kernel, blur_sigma, solarize[i], interpolation,
            )
            for i in range(2)
        ]  # fmt: skip
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
                side, area, ratio, flip, vertical_flip,
                jitter, jitter_p, grayscale, blur, blur_kernel, blur_sigma, 0.0, interpolation,
            )
            for side, area in crops
        ]  # fmt: skip
        super().__init__(views, mean, std)


simclr_views = SimCLRViews
moco_views = MoCoViews
byol_views = BYOLViews
multicrop_views = MultiCropViews
