"""Rasters of any number of bands (GeoTIFF and whatever else rasterio reads), and statistics of bands."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.data.extras import import_extra
from lightning_nrml.data.sources import BadImageError, ImageSource, checked_size
from lightning_nrml.data.views.base import as_float
from lightning_nrml.files import write_text

#: images decoded at a time for statistics
_CHUNK = 64
# filters of warnings belong to the whole process, and images are decoded on several threads
_opening = threading.Lock()


def _unlock() -> None:
    """A loader process that is forked while another thread opens a file must not wait for that thread."""
    global _opening
    _opening = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_unlock)


@contextlib.contextmanager
def open_raster(path: str) -> Iterator[Any]:
    """``rasterio.open`` without its warning of files that have no place on earth."""
    rasterio = import_extra("rasterio", path)
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        opened = rasterio.open(path)
    with opened as file:
        yield file


class RasterSource(ImageSource):
    """Raster files, one per image, as float32 in the units of the files.

    A file that is missing, cannot be read, lacks a band, has another size than the first one (without
    ``image_size``), or holds NaN, infinity or nodata pixels is refused by name.

    Args:
        paths: one per image.
        bands: numbers of the bands to read, from 1, in this order; ``None`` = all of the first file, which
            all others must have, too.
        image_size: side of the square to resize to (antialiased bilinear); ``None`` keeps the stored size.

    Raises:
        ValueError: a band number is below 1 or named twice.
        BadImageError: no file can be opened.
        ImportError: rasterio is not installed.
    """

    dtype = torch.float32

    def __init__(
        self, paths: Sequence[str | Path], bands: Sequence[int] | None = None, image_size: int | None = None
    ) -> None:
        if bands is not None and (not bands or min(bands) < 1 or len(set(bands)) != len(bands)):
            raise ValueError(f"bands are numbered from 1 and named once each, got {list(bands)}")
        self.paths = np.asarray([str(p) for p in paths], dtype=np.str_)
        shape = self._first_shape()
        self.bands = list(range(1, shape[0] + 1)) if bands is None else list(bands)
        self.all_bands = bands is None
        self.channels = len(self.bands)
        self.image_size = image_size
        self.size = checked_size(image_size) or shape[1:]

    def _first_shape(self) -> tuple[int, int, int]:
        rasterio = import_extra("rasterio", self.paths[0] if len(self.paths) else "rasters")
        for path in self.paths:
            try:
                with open_raster(str(path)) as file:
                    return int(file.count), int(file.height), int(file.width)
            except (rasterio.errors.RasterioError, OSError):
                continue
        first = f", such as {self.paths[0]}" if len(self.paths) else ""
        raise BadImageError(f"none of the {len(self.paths)} rasters can be opened{first}; check the path")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def missing(self) -> list[int]:
        return [row for row, path in enumerate(self.paths) if not Path(path).is_file()]

    def reading(self) -> tuple[object, ...]:
        return "RasterSource", self.bands, self.size

    def files(self) -> Iterable[str]:
        return map(str, self.paths)

    def subset(self, rows: np.ndarray) -> RasterSource:
        bands = None if self.all_bands else self.bands
        return RasterSource(self.paths[rows].tolist(), bands, self.image_size)

    def other(self, files: Sequence[str]) -> RasterSource:
        others = copy(self)
        others.paths = np.asarray(files, dtype=np.str_)
        return others

    def get(self, indices: Sequence[int]) -> Tensor:
        images = [self.decode(row) for row in indices]
        return torch.stack(images) if images else torch.empty((0, self.channels, *(self.size or (0, 0))))

    def decode(self, row: int) -> Tensor:
        """One image as float32 ``(channels, H, W)``."""
        rasterio = import_extra("rasterio", self.paths[row])
        try:
            with open_raster(str(self.paths[row])) as file:
                self._check_shape(row, file.count, (file.height, file.width))
                pixels = file.read(self.bands)
                nodata = [file.nodatavals[band - 1] for band in self.bands]
                hidden = ~file.read_masks(self.bands).astype(bool) if self._has_mask(file) else None
        except (rasterio.errors.RasterioError, OSError) as error:
            raise BadImageError(
                f"cannot read {self.name(row)} ({type(error).__name__}: {error}); mend or remove it, or set "
                "on_bad_image: skip"
            ) from error
        self._check_pixels(row, pixels, nodata, hidden)
        image = torch.from_numpy(pixels.astype(np.float32))
        if self.size is not None and image.shape[1:] != self.size:
            image = F.interpolate(image[None], self.size, mode="bilinear", antialias=True)[0]
        return image

    def _check_shape(self, row: int, count: int, size: tuple[int, int]) -> None:
        if count < max(self.bands) or (self.all_bands and count != self.channels):
            raise BadImageError(
                f"{self.name(row)} has {count} bands, but bands {self.bands} are asked for; mend or remove "
                "it, or set bands"
            )
        if self.image_size is None and size != self.size:
            raise BadImageError(
                f"{self.name(row)} is {size[0]} x {size[1]}, but the first raster is {self.size}; set "
                "image_size to bring all to one size"
            )

    def _has_mask(self, file: Any) -> bool:
        """Whether it has a mask of its own; what is transparent has pixels all the same."""
        flags = [{flag.name for flag in file.mask_flag_enums[band - 1]} for band in self.bands]
        return any("per_dataset" in named and "alpha" not in named for named in flags)

    def _check_pixels(
        self, row: int, pixels: np.ndarray, nodata: list[float | None], hidden: np.ndarray | None
    ) -> None:
        for i, (band, plane, empty) in enumerate(zip(self.bands, pixels, nodata, strict=True)):
            bad = ~np.isfinite(plane)
            if empty is not None and np.isfinite(empty):
                bad |= plane == empty
            if hidden is not None:
                bad |= hidden[i]
            if bad.any():
                raise BadImageError(
                    f"{self.name(row)}, band {band}: {int(bad.sum())} of {bad.size} pixels are NaN, "
                    f"infinite, nodata ({empty}) or masked; fill or remove it, or set on_bad_image: skip"
                )


def band_statistics(images: ImageSource) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of every band over all pixels, in one pass.

    uint8 images count in units of [0, 1], as views scale them. A constant band gets the deviation 1, for it
    is to be divided by. Unreadable images are left out.
    """
    total = torch.zeros(2, images.channels, dtype=torch.float64)
    shift, pixels = torch.zeros(images.channels, dtype=torch.float64), 0
    for start in range(0, len(images), _CHUNK):
        batch = _readable(images, range(start, min(start + _CHUNK, len(images))))
        if batch is None:
            continue
        values = as_float(batch).double()
        if pixels == 0:
            shift = values.mean(dim=(0, 2, 3))  # sums of squares about the mean lose no digits
        values = values - shift[:, None, None]
        total += torch.stack([values.sum(dim=(0, 2, 3)), (values**2).sum(dim=(0, 2, 3))])
        pixels += values[:, 0].numel()
    if pixels == 0:
        raise BadImageError(f"none of the {len(images)} images can be read, such as {images.name(0)}")
    mean, square = total / pixels
    std = (square - mean**2).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, 1.0)
    return tuple((mean + shift).tolist()), tuple(std.tolist())


def _readable(images: ImageSource, rows: range) -> Tensor | None:
    try:
        return images.get(rows)
    except BadImageError:
        found = []
        for row in rows:
            try:
                found.append(images.get([row]))
            except BadImageError:
                continue
        return torch.cat(found) if found else None


def cached_statistics(images: ImageSource, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """:func:`band_statistics`, kept in ``folder`` under a hash of what they depend on.

    That is how the source reads, and name, size and time of change of each of its files. Of a source without
    files, nothing is kept.

    Args:
        images: the training images.
        folder: made if it is not there. If it cannot be written, nothing is kept.
    """
    digest, count = hashlib.sha256(repr(images.reading()).encode()), 0
    for name in images.files():
        count += 1
        try:
            stat = os.stat(name)
        except OSError:  # it may be skipped
            digest.update(repr(name).encode())
        else:
            digest.update(repr((os.path.abspath(name), stat.st_size, stat.st_mtime_ns)).encode())
    if not count:
        return band_statistics(images)
    file = folder.expanduser() / f"bands_{digest.hexdigest()[:16]}.json"
    if file.is_file():
        with contextlib.suppress(
            LookupError, TypeError, ValueError, OSError
        ):  # else it is damaged, and made anew
            saved = json.loads(file.read_text(encoding="utf-8"))
            return tuple(saved["mean"]), tuple(saved["std"])
    mean, std = band_statistics(images)
    with contextlib.suppress(OSError):  # it is only a cache
        write_text(file, json.dumps({"mean": mean, "std": std}))
    return mean, std
