"""From an opened picture to a tensor of one size."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import EXTRASAMPLES, SAMPLESPERPIXEL
from torch import Tensor

Fit = Literal["crop", "squash"]
# what Pillow's decoders raise on damaged files
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def to_tensor(image: Image.Image, channels: int, size: tuple[int, int] | None, fit: Fit = "crop") -> Tensor:
    """Decode, turn upright (EXIF), convert and resize a Pillow image to uint8 ``(channels, H, W)``.

    Resizing is Pillow's antialiased bilinear filter. JPEGs at least four times too large are first
    decoded at a fraction of their size (never below twice the target), which is much faster.

    Raises:
        ValueError: 8 bits of three colours would not do for what the image holds; says what it is.
    """
    image = _eight_bits(image)
    mode = "RGB" if channels == 3 else "L"
    if size is not None:
        image.draft(mode, (2 * size[1], 2 * size[0]))
    with suppress(*DECODE_ERRORS):  # damaged notes of a camera; if it is the pixels, they fail below
        ImageOps.exif_transpose(image, in_place=True)
    image = image.convert(mode)
    if size is not None and image.size != (size[1], size[0]):
        box = _centre_box(image.size, size) if fit == "crop" else None
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    array = np.array(image, dtype=np.uint8)
    pixels = torch.from_numpy(array)
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image, if 8-bit colours can show it; Pillow would clip more bits, and leave out further bands."""
    deep = image.mode in ("I", "F") or image.mode.startswith("I;")
    if deep and image.format == "PNG":  # 16 bits of grey, full range: the higher 8, as Pillow has it for RGB
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    tags = getattr(image, "tag_v2", {})
    extra = tags.get(EXTRASAMPLES, ())  # what bands beyond the colours are; 0 = not said, so no transparency
    if deep or 0 in (extra if isinstance(extra, tuple) else (extra,)):
        what = f"pixels of mode {image.mode}" if deep else f"{tags.get(SAMPLESPERPIXEL)} bands"
        raise ValueError(
            f"{what} do not fit into 8-bit colours; convert it, or read it as a raster (bands of "
            "MultiLabelRSDataModule)"
        )
    return image


def _centre_box(have: tuple[int, int], want: tuple[int, int]) -> tuple[float, float, float, float]:
    """Largest centred box of the wanted ``(height, width)`` aspect inside ``(width, height)``."""
    width, height = have
    scale = min(width / want[1], height / want[0])
    # rounded down to below 0 for some sizes, which Pillow refuses
    dx, dy = max((width - scale * want[1]) / 2, 0.0), max((height - scale * want[0]) / 2, 0.0)
    return dx, dy, width - dx, height - dy
