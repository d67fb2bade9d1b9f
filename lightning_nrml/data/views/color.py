"""Operations that change values: jitter, greyscale, blur, solarise. Any number of channels.

Images in units of their own (float, with a value outside [0, 1]: counts, decibels, standardised bands) are
never clipped, and what is a share of [0, 1] elsewhere is a share of each band's own values in that image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.data.views.base import ViewOp, as_float, in_own_units, on_rows
from lightning_nrml.data.views.rng import Draws

# ITU-R 601 luma, as Pillow, torchvision and kornia use it
_LUMA = (0.2989, 0.587, 0.114)


def grey_of(image: Tensor, own_units: bool = False) -> Tensor:
    """``(B, 1, H, W)`` luma of RGB, or the mean of the bands of any other image.

    With ``own_units`` the bands have no common unit: the mean is that of the standardised bands, which each
    band gets at its own mean and deviation, ``(B, C, H, W)``.
    """
    if own_units:
        mean = image.mean((2, 3), keepdim=True)
        spread = image.std((2, 3), correction=0, keepdim=True)
        # a constant band has no pattern to give, only the rounding of its mean
        common = ((image - mean) / torch.maximum(spread, 1e-5 * mean.abs()).clamp_(min=1e-30)).mean(1, True)
        return common * spread + mean
    if image.shape[1] != 3:
        return image.mean(1, keepdim=True)
    red, green, blue = image[:, 0:1], image[:, 1:2], image[:, 2:3]
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _own_units(image: Tensor, draws: Draws) -> Tensor:
    """``(B,)`` bool: as the draws tell; an operation that is called alone looks at its input."""
    return in_own_units(image) if draws.own_units is None else draws.own_units


def _change_rows(
    image: Tensor, rows: Tensor, draws: Draws, change: Callable[[Tensor, Tensor, bool], Tensor]
) -> Tensor:
    """:func:`on_rows` in float32; ``change(part, chosen, own_units)`` gets images of one kind at a time."""
    own = _own_units(image, draws)
    image = on_rows(as_float(image), rows & ~own, lambda part, chosen: change(part, chosen, False))
    return on_rows(image, rows & own, lambda part, chosen: change(part, chosen, True))


def shift_hue(image: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images in HSV space.

    Args:
        image: ``(B, 3, H, W)`` float in [0, 1].
        shift: ``(B,)`` in turns (1 = full circle).

    Returns:
        The same shape; value and saturation of every pixel are kept.
    """
    red, green, blue = image.unbind(1)
    # Buffers are reused: on a CPU fresh memory costs more than the arithmetic.
    value = torch.maximum(red, green)
    torch.maximum(value, blue, out=value)
    chroma = torch.minimum(red, green)
    torch.minimum(chroma, blue, out=chroma)
    torch.sub(value, chroma, out=chroma)
    # Hue without branches (selects and remainders are ten times as slow as arithmetic on a CPU):
    # p = (g - b) / chroma gives the side of the circle, q = (max - r) / chroma how far from red.
    # |hue| = |p| + q (3 - 2|p|) sixths of a turn: |p| where red is the maximum (q = 0), 3 - |p| where it
    # is the minimum (q = 1), and 1 + q between (|p| = 1).
    buffer = chroma.clamp(min=1e-12).reciprocal_()
    p = (green - blue).mul_(buffer)
    turn = (value - red).mul_(buffer)
    torch.abs(p, out=buffer)
    d = torch.rsub(buffer, 3.0, alpha=2.0)
    turn.mul_(d).add_(buffer).copysign_(p).mul_(1 / 6).add_(shift[:, None, None])
    out = torch.empty_like(image)
    for channel, offset in enumerate((1 / 2, 1 / 6, -1 / 6)):
        # distance from the hue at which this channel is lowest (cyan, magenta, yellow), in turns
        torch.add(turn, offset, out=d)
        torch.round(d, out=buffer)
        d.sub_(buffer).abs_().mul_(-6.0).add_(2.0).clamp_(0.0, 1.0)
        torch.addcmul(value, chroma, d, value=-1.0, out=out[:, channel])
    return out


class ColorJitter(ViewOp):
    """Random brightness, contrast, saturation and hue, in an order of its own for every sample.

    Each is the blend of torchvision's functions, ``clip(f x + (1 - f) target)`` with target 0, the mean
    grey level, or the grey image; factors are uniform in [max(0, 1 - a), 1 + a], the hue shift in
    [-hue, hue] turns. Values are clipped to [0, 1] after each step.

    Images without exactly three channels are jittered band-wise: "grey" is the mean of the bands,
    and hue becomes a gain of its own for every band, uniform in [1 - hue, 1 + hue]. One channel has no
    saturation or hue.

    Images in units of their own are jittered band-wise and without the clip, three bands too; contrast is
    about each band's own mean, and "grey" is the pattern that the bands share, at each band's own mean and
    deviation.

    Args:
        brightness, contrast, saturation: half-width a of the factor's range, >= 0.
        hue: half-width of the hue shift in turns, in [0, 0.5].
        p: share of the samples that are jittered.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        p: float = 0.8,
    ) -> None:
        super().__init__()
        if min(brightness, contrast, saturation) < 0 or not 0 <= hue <= 0.5:
            raise ValueError(
                f"brightness, contrast and saturation must be >= 0 and hue in [0, 0.5], got "
                f"{brightness}, {contrast}, {saturation}, {hue}."
            )
        self.strength = (brightness, contrast, saturation)
        self.hue = hue
        self.p = p

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps the shape; float32."""
        u = draws.uniform(8 + image.shape[1])
        applied, order = u[:, 0] < self.p, u[:, 1:5].argsort(1)
        low = torch.tensor([max(0.0, 1 - a) for a in self.strength])
        high = torch.tensor([1 + a for a in self.strength])
        factor = low + (high - low) * u[:, 5:8]
        hue = (2 * u[:, 8:] - 1) * self.hue

        def change(part: Tensor, chosen: Tensor, own_units: bool) -> Tensor:
            jitter = partial(self.jitter, own_units=True) if own_units else self.jitter
            return jitter(part, order[chosen], factor[chosen], hue[chosen])

        return _change_rows(image, applied, draws, change)

    def jitter(
        self, image: Tensor, order: Tensor, factor: Tensor, hue: Tensor, own_units: bool = False
    ) -> Tensor:
        """Apply given parameters.

        Args:
            image: ``(B, C, H, W)`` float32.
            order: ``(B, 4)`` int64, which of brightness 0, contrast 1, saturation 2, hue 3 comes when.
            factor: ``(B, 3)`` blend factors of the first three.
            hue: ``(B, C)``; RGB uses column 0 as the shift in turns, other images all as band gains - 1.
            own_units: the images are not in [0, 1].
        """
        # Samples with the hue at the same place lie side by side, so that its turn is a slice.
        hue_at, row = (order == 3).int().argmax(1).sort()
        order, factor, hue = order[row], factor[row], hue[row]
        last = torch.searchsorted(hue_at, torch.arange(5)).tolist()
        image = image[row.to(image.device, non_blocking=True)]
        self._jitter_hue(image, hue, last[0], last[1], own_units)
        for slot, kind in enumerate(order[order != 3].view(-1, 3).unbind(1)):
            f = factor.gather(1, kind[:, None])[:, 0]
            _blend_(image, f, (1 - f) * (kind == 1), (1 - f) * (kind == 2), own_units)
            self._jitter_hue(image, hue, last[slot + 1], last[slot + 2], own_units)
        return image[row.argsort().to(image.device, non_blocking=True)]

    def _jitter_hue(self, image: Tensor, hue: Tensor, start: int, stop: int, own_units: bool) -> None:
        """Shift the hue (or the gains of the bands) of a slice of rows, in place."""
        if self.hue == 0 or image.shape[1] == 1 or start == stop:
            return
        part, amount = image[start:stop], hue[start:stop].to(image.device, non_blocking=True)
        if part.shape[1] == 3 and not own_units:
            part.copy_(shift_hue(part, amount[:, 0]))
        else:
            part.mul_(1 + amount[:, :, None, None])
            if not own_units:
                part.clamp_(0.0, 1.0)


def _blend_(image: Tensor, factor: Tensor, to_mean: Tensor, to_grey: Tensor, own_units: bool) -> None:
    """In place ``clip(factor x + to_mean * mean grey + to_grey * grey)``, one number per sample each."""
    numbers = torch.stack([factor, to_mean, to_grey]).to(image.device, non_blocking=True)
    factor, to_mean, to_grey = numbers[:, :, None, None, None]
    grey = grey_of(image, own_units)
    offset = grey.mean((2, 3), keepdim=True).mul_(to_mean)
    torch.addcmul(grey.mul_(to_grey).add_(offset), image, factor, out=image)
    if not own_units:
        image.clamp_(0.0, 1.0)


class BandJitter(ViewOp):
    """Gain, offset and pixel noise for any number of channels: ``clip(x * gain + shift + noise)``.

    Images in units of their own are not clipped, and ``shift`` and ``noise`` are shares of each band's level,
    the mean of its absolute values in that image.

    Args:
        brightness: gain uniform in [1 - brightness, 1 + brightness].
        contrast: then each band is stretched about its own mean by a factor in [1 - c, 1 + c].
        shift: offset uniform in [-shift, shift], in units of [0, 1].
        noise: standard deviation of Gaussian noise, independent for every pixel and band.
        per_band: draw gain, contrast and shift for every band; else one of each for the sample.
        clip: clip the result to [0, 1], if the image is in [0, 1]; ``False``: all values are taken as they
            are, ``shift`` and ``noise`` in their unit.
        p: share of the samples that are changed.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        shift: float = 0.0,
        noise: float = 0.0,
        per_band: bool = False,
        clip: bool = True,
        p: float = 1.0,
    ) -> None:
        super().__init__()
        if min(brightness, contrast, shift, noise) < 0:
            raise ValueError(
                f"brightness, contrast, shift and noise must be >= 0, got "
                f"{brightness}, {contrast}, {shift}, {noise}."
            )
        self.brightness = brightness
        self.contrast = contrast
        self.shift = shift
        self.noise = noise
        self.per_band = per_band
        self.clip = clip
        self.p = p

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps the shape; float32."""
        image = as_float(image)
        b, bands = image.shape[:2]
        n = bands if self.per_band else 1
        u = draws.uniform(1 + 3 * n)
        applied = u[:, :1] < self.p
        signed = (2 * u[:, 1:] - 1) * applied
        gain = 1 + self.brightness * signed[:, :n]
        stretch = 1 + self.contrast * signed[:, n : 2 * n]
        shift = self.shift * signed[:, 2 * n :]
        numbers = torch.stack([gain * stretch, gain * (1 - stretch), shift])
        scale, to_mean, offset = numbers.to(image.device, non_blocking=True)[..., None, None]
        own_units = level = None
        if self.clip and bool((own := _own_units(image, draws)).any()):
            own_units = own.to(image.device, non_blocking=True).view(b, 1, 1, 1)
            level = image.abs().mean((2, 3), keepdim=True).where(own_units, 1.0)
            offset = offset * level
        if self.contrast > 0:
            offset = offset + to_mean * image.mean((2, 3), keepdim=True)
        out = image * scale + offset
        if self.noise > 0:
            noise = draws.normal(image[0].numel(), image.device).view_as(image)
            amount = (self.noise * applied.float()).to(image.device, non_blocking=True).view(b, 1, 1, 1)
            out += noise * (amount if level is None else amount * level)
        if not self.clip:
            return out
        return out.clamp_(0.0, 1.0) if own_units is None else out.where(own_units, out.clamp(0.0, 1.0))


class Grayscale(ViewOp):
    """Replace all channels by the luma (RGB) or by the mean of the bands, with probability ``p``.

    In units of their own: by the pattern that the bands share, at each band's own mean and deviation.
    """

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.p = p

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps the shape; float32."""
        if image.shape[1] == 1:
            return image

        def change(part: Tensor, _: Tensor, own_units: bool) -> Tensor:
            return grey_of(part, own_units).expand_as(part)

        return _change_rows(image, draws.happens(self.p), draws, change)


def blur(image: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur with a width of its own for every sample: two one-dimensional convolutions.

    Args:
        image: ``(B, C, H, W)`` float32; H and W must exceed ``kernel_size // 2`` (reflected edges).
        sigma: ``(B,)`` standard deviation in pixels, on the image's device.
        kernel_size: odd number of taps.
    """
    b, c, h, w = image.shape
    radius = kernel_size // 2
    tap = torch.arange(-radius, radius + 1, dtype=torch.float32, device=image.device)
    kernel = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)
    flat = image.reshape(1, b * c, h, w)
    flat = F.pad(flat, (radius, radius, 0, 0), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=b * c)
    flat = F.pad(flat, (0, 0, radius, radius), mode="reflect")
    return F.conv2d(flat, kernel[:, None, :, None], groups=b * c).view(b, c, h, w)


class GaussianBlur(ViewOp):
    """Gaussian blur of random width with probability ``p``.

    Args:
        kernel_size: taps; ``None`` = a tenth of the image height, made odd (SimCLR's official code).
        sigma: range of the standard deviation in pixels, uniform.
        p: share of the samples that are blurred.
    """

    def __init__(
        self, kernel_size: int | None = None, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5
    ) -> None:
        super().__init__()
        if kernel_size is not None and (kernel_size < 1 or kernel_size % 2 == 0):
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}.")
        if not 0 < sigma[0] <= sigma[1]:
            raise ValueError(f"sigma must be a positive range, low <= high, got {sigma}.")
        self.kernel_size = kernel_size
        self.sigma = (float(sigma[0]), float(sigma[1]))
        self.p = p

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps the shape; float32."""
        size = self.kernel_size or (image.shape[2] // 10) // 2 * 2 + 1
        u = draws.uniform(2)
        applied = u[:, 0] < self.p
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * u[:, 1]

        def change(part: Tensor, chosen: Tensor) -> Tensor:
            return blur(part, sigma[chosen].to(part.device, non_blocking=True), size)

        return on_rows(as_float(image), applied, change)


class Solarize(ViewOp):
    """Invert the values at or above ``threshold`` with probability ``p``.

    In units of their own: within the range that each band has in that image.
    """

    def __init__(self, threshold: float = 0.5, p: float = 0.2) -> None:
        super().__init__()
        self.threshold = threshold
        self.p = p

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps the shape; float32."""

        def change(part: Tensor, _: Tensor, own_units: bool) -> Tensor:
            if not own_units:
                return torch.where(part >= self.threshold, 1.0 - part, part)
            low, high = part.amin((2, 3), keepdim=True), part.amax((2, 3), keepdim=True)
            return torch.where(part >= low + self.threshold * (high - low), low + high - part, part)

        return _change_rows(image, draws.happens(self.p), draws, change)
