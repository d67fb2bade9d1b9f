"""Operations that move pixels: crop and resize, flips, affine maps, erasing."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.data.views.base import ViewOp, as_float, on_rows
from lightning_nrml.data.views.rng import Draws

Interpolation = Literal["bilinear", "bicubic"]


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    """Interpolation kernel at distances ``x`` in (scaled) pixels; bicubic with a = -0.5 as in Pillow."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1.0 - x).clamp_(min=0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resample_matrix(start: Tensor, length: Tensor, source: int, size: int, interpolation: str) -> Tensor:
    """Weights of an antialiased resize of one axis, per sample.

    Args:
        start: ``(B,)`` first pixel of the crop.
        length: ``(B,)`` pixels in the crop, >= 1.
        source: pixels of the input axis.
        size: pixels of the output axis.
        interpolation: ``"bilinear"`` or ``"bicubic"``.

    Returns:
        ``(B, size, source)`` float32, rows sum to 1, zero outside the crop (as if it were cut out first).
    """
    start, length = (x.to(torch.float32)[:, None, None] for x in (start, length))
    scale = length / size
    out = torch.arange(size, dtype=torch.float32, device=start.device)[None, :, None] + 0.5
    pixel = torch.arange(source, dtype=torch.float32, device=start.device)[None, None, :] + 0.5 - start
    weight = _kernel((pixel - out * scale) / scale.clamp(min=1.0), interpolation)
    weight = weight * ((pixel > 0) & (pixel < length))
    return weight / weight.sum(2, keepdim=True)


def resize_boxes_by_matrix(image: Tensor, box: Tensor, size: int, interpolation: str) -> Tensor:
    """:func:`resize_boxes` as two batched matrix products: no step per image, so fit for a GPU."""
    top, left, height, width = box.to(image.device, non_blocking=True).unbind(1)
    b, c, h, w = image.shape
    rows = resample_matrix(top, height, h, size, interpolation)
    columns = resample_matrix(left, width, w, size, interpolation)
    flat = as_float(image).transpose(1, 2).reshape(b, h * c, w)
    flat = torch.bmm(flat, columns.transpose(1, 2)).view(b, h, c * size)
    out = torch.bmm(rows, flat).view(b, size, c, size).transpose(1, 2).contiguous()
    # bicubic overshoots; bytes stay within their range
    return out.clamp_(0.0, 1.0) if image.dtype is torch.uint8 else out


def resize_boxes(image: Tensor, box: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """Cut a box of its own out of every image and resize it, with antialiasing.

    On the CPU bytes stay bytes (rounded, as torchvision and Pillow do); on other devices the result is
    float32. The two agree within half a grey level (1/510) plus rounding.

    Args:
        image: ``(B, C, H, W)`` uint8 or float.
        box: ``(B, 4)`` int64 on the CPU: top, left, height, width, inside the image.
        size: side of the square result.
        interpolation: ``"bilinear"`` or ``"bicubic"``.

    Returns:
        ``(B, C, size, size)``.
    """
    if image.device.type != "cpu":
        return resize_boxes_by_matrix(image, box, size, interpolation)
    image = image if image.dtype is torch.uint8 else as_float(image)
    parts = [
        F.interpolate(
            image[i : i + 1, :, top : top + height, left : left + width],
            (size, size),
            mode=interpolation,
            antialias=True,
        )
        for i, (top, left, height, width) in enumerate(box.tolist())
    ]
    return torch.cat(parts)


class Resize(ViewOp):
    """Deterministic resize to a square, optionally of the central part.

    Args:
        size: side of the result in pixels.
        interpolation: ``"bilinear"``, ``"bicubic"`` (both antialiased) or ``"area"`` (mean of the pixels
            under each output pixel, ``adaptive_avg_pool2d``).
        center_fraction: share of each side that is kept, in (0, 1]; .875 is the usual "resize 256,
            crop 224".
    """

    def __init__(
        self,
        size: int,
        interpolation: Literal["bilinear", "bicubic", "area"] = "bilinear",
        center_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < center_fraction <= 1:
            raise ValueError(f"center_fraction must lie in (0, 1], got {center_fraction}.")
        self.size = size
        self.interpolation = interpolation
        self.center_fraction = center_fraction

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, size, size)``."""
        h, w = image.shape[2:]
        height, width = (max(1, round(side * self.center_fraction)) for side in (h, w))
        top, left = (h - height) // 2, (w - width) // 2
        image = image[:, :, top : top + height, left : left + width]
        if image.shape[2:] == (self.size, self.size):
            return image
        if self.interpolation == "area":
            return F.adaptive_avg_pool2d(as_float(image), self.size)
        out = F.interpolate(as_float(image), (self.size, self.size), mode=self.interpolation, antialias=True)
        return out.clamp_(0.0, 1.0) if image.dtype is torch.uint8 else out


class RandomResizedCrop(ViewOp):
    """Crop of random area and aspect ratio, resized to a square (as torchvision's op of that name).

    Ten (area, ratio) pairs are drawn; the first box that fits is taken, else the largest central one of
    an allowed ratio.

    Args:
        size: side of the result in pixels.
        scale: range of the share of the image area, uniform.
        ratio: range of width / height, uniform in the logarithm.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.
    """

    attempts = 10

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the area, 0 < low <= high <= 1, got {scale}.")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be two positive aspect ratios, low <= high, got {ratio}.")
        self.size = size
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.interpolation = interpolation

    def boxes(self, height: int, width: int, draws: Draws) -> Tensor:
        """``(B, 4)`` int64 boxes (top, left, height, width) in an image of that size."""
        n = self.attempts
        u = draws.uniform(2 * n + 2).double()
        low, high = (math.log(r) for r in self.ratio)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, :n]) * (height * width)
        log_ratio = low + (high - low) * u[:, n : 2 * n]
        place = u[:, 2 * n :]
        h = (area * torch.exp(-log_ratio)).sqrt().round().clamp_(min=1)
        w = (area * torch.exp(log_ratio)).sqrt().round().clamp_(min=1)
        fits = (h <= height) & (w <= width)
        first = fits.to(torch.int8).argmax(1, keepdim=True)
        h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        none_fits = ~fits.any(1)
        h = h.masked_fill(none_fits, round(min(height, width / ratio)))
        w = w.masked_fill(none_fits, round(min(width, height * ratio)))
        place = place.masked_fill(none_fits[:, None], 0.5)
        top = (place[:, 0] * (height - h + 1)).floor()
        left = (place[:, 1] * (width - w + 1)).floor()
        return torch.stack([top, left, h, w], 1).long()

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, size, size)``."""
        box = self.boxes(image.shape[2], image.shape[3], draws)
        return resize_boxes(image, box, self.size, self.interpolation)


class HorizontalFlip(ViewOp):
    """Mirror left and right with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps shape and dtype."""
        return on_rows(image, draws.happens(self.p), lambda part, _: part.flip(3))


class VerticalFlip(ViewOp):
    """Mirror top and bottom with probability ``p`` (aerial images have no upright)."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps shape and dtype."""
        return on_rows(image, draws.happens(self.p), lambda part, _: part.flip(2))


class RandomAffine(ViewOp):
    """Rotate, shear, scale and shift about the centre, bilinear, all magnitudes uniform.

    The content is sheared, then rotated and scaled, then shifted.

    Args:
        degrees: rotation in [-degrees, degrees], counter-clockwise positive.
        scale: range of the magnification; ``None`` = 1.
        shear: horizontal shear coefficient (pixels of x per pixel of y) in [-shear, shear].
        translate: shift in [-translate, translate] times the side, for each axis on its own.
        fill: value of pixels from outside the image.
        p: share of the samples that are changed.
    """

    def __init__(
        self,
        degrees: float = 0.0,
        scale: tuple[float, float] | None = None,
        shear: float = 0.0,
        translate: float = 0.0,
        fill: float = 0.0,
        p: float = 1.0,
    ) -> None:
        super().__init__()
        if scale is not None and not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be two positive magnifications, low <= high, got {scale}.")
        self.degrees = degrees
        self.scale = (1.0, 1.0) if scale is None else (float(scale[0]), float(scale[1]))
        self.shear = shear
        self.translate = translate
        self.fill = fill
        self.p = p

    def theta(self, height: int, width: int, draws: Draws) -> Tensor:
        """``(B, 2, 3)`` maps from output to input in ``affine_grid``'s coordinates."""
        u = draws.uniform(5).double()
        signed = 2 * u - 1
        angle = (self.degrees * signed[:, 0]).deg2rad()
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 1]
        shear = self.shear * signed[:, 2]
        # affine_grid's side is 2
        shift = 2 * self.translate * signed[:, 3:]
        cos, sin = angle.cos() / scale, angle.sin() / scale
        # y points down; inverse of (scale * rotation) @ shear is unshear @ rotation(-angle) / scale
        inverse = torch.stack([cos - shear * sin, -sin - shear * cos, sin, cos], 1).view(-1, 2, 2)
        aspect = torch.tensor([[1.0, height / width], [width / height, 1.0]], dtype=torch.float64)
        inverse = inverse * aspect
        offset = -inverse @ shift[:, :, None]
        return torch.cat([inverse, offset], 2).float()

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps the shape; float32."""
        image = as_float(image)
        theta = self.theta(image.shape[2], image.shape[3], draws)

        def warp(part: Tensor, chosen: Tensor) -> Tensor:
            mapping = theta[chosen].to(part.device, non_blocking=True)
            grid = F.affine_grid(mapping, list(part.shape), align_corners=False)
            return F.grid_sample(part - self.fill, grid, align_corners=False).add_(self.fill)

        return on_rows(image, draws.happens(self.p), warp)


class RandomErasing(ViewOp):
    """Overwrite a random rectangle (Zhong et al. 2020, Algorithm 1; one attempt, box cut to the image).

    Args:
        p: probability per sample.
        scale: range of the share of the area.
        ratio: range of height / width, uniform in the logarithm.
        value: what to write, in units of [0, 1].
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float = 0.0,
    ) -> None:
        super().__init__()
        self.p = p
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.value = value

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Keeps the shape; float32."""
        image = as_float(image)
        height, width = image.shape[2:]
        u = draws.uniform(5).double()
        applied, place = u[:, 0] < self.p, u[:, 3:]
        low, high = (math.log(r) for r in self.ratio)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 1]) * (height * width)
        ratio = (low + (high - low) * u[:, 2]).exp()
        h = (area * ratio).sqrt().round().clamp_(1, height)
        w = (area / ratio).sqrt().round().clamp_(1, width)
        top = (place[:, 0] * (height - h + 1)).floor()
        left = (place[:, 1] * (width - w + 1)).floor()
        edge = torch.stack([top, top + h, left, left + w], 1) * applied[:, None]
        edge = edge.to(torch.int64).to(image.device, non_blocking=True)[:, :, None]
        y = torch.arange(height, device=image.device)[None]
        x = torch.arange(width, device=image.device)[None]
        inside_y = (y >= edge[:, 0]) & (y < edge[:, 1])
        inside_x = (x >= edge[:, 2]) & (x < edge[:, 3])
        return image.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], self.value)
