"""Where images come from: memory, concatenated JPEGs, files. One batched call, uint8 out.

A source answers ``get(indices) -> uint8 (n, C, H, W)`` (rasters of many bands: float32).
In-memory sets are a single index operation, the others decode per item with Pillow and bring every image
to one size, so that all further image work can happen in batches on the training device.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.data.decode import DECODE_ERRORS, Fit, to_tensor

_DECODE_THREADS = 4
#: pixels, a side of an image that people can recognise something in
PICTURE = 96


class BadImageError(RuntimeError):
    """An image is missing or cannot be decoded; the message names it."""


class ImageSource(ABC):
    """A fixed list of images of one size.

    Attributes:
        channels: number of channels of every image.
        size: ``(height, width)``, or ``None`` if only the files know.
        dtype: uint8, or float32 for rasters, whose values are physical.
    """

    channels: int
    dtype: torch.dtype = torch.uint8
    size: tuple[int, int] | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get(self, indices: Sequence[int]) -> Tensor:
        """Images at ``indices`` as :attr:`dtype` ``(n, channels, H, W)``.

        Raises:
            BadImageError: an image is missing or corrupt.
        """

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """The same for people to look at: uint8, physical values stretched band by band."""
        images = self.get(indices)
        if images.dtype == torch.uint8 or not len(images):
            return images
        flat = images.flatten(2).float().nan_to_num()
        low, high = (torch.quantile(flat, q, dim=2)[..., None, None] for q in (0.02, 0.98))
        bright = (images.float().nan_to_num() - low) / (high - low).clamp_min(1e-12)
        return (255 * bright.clamp(0, 1)).to(torch.uint8)

    @abstractmethod
    def subset(self, rows: np.ndarray) -> ImageSource:
        """The source restricted to ``rows`` (int64 positions), in that order."""

    def other(self, files: Sequence[str]) -> ImageSource:
        """Other image files, read as these are.

        Raises:
            ValueError: these are no files, so that nothing says how to read others.
        """
        raise ValueError(
            "the images of this data set do not come from image files, so nothing says how to read others: "
            "name a data set of files, such as FolderDataModule"
        )

    def name(self, row: int) -> str:
        """How to call an image in a message."""
        return f"image {row}"

    def reading(self) -> tuple[object, ...]:
        """What decides on the pixels beside the contents of :meth:`files`: bands, size, ..."""
        return ()

    def files(self) -> Iterable[str]:
        """The files that pixels are read from; none if nothing tells."""
        return ()

    def missing(self) -> list[int]:
        """Rows that are known to be absent without decoding anything."""
        return []


class MemorySource(ImageSource):
    """Decoded images held in memory.

    Args:
        images: uint8 or float32 ``(N, C, H, W)``.
        bad: row -> message for images that could not be decoded (their pixels are meaningless).
        origin: where they came from, for :meth:`pictures` of the first size.
    """

    def __init__(
        self, images: Tensor, bad: Mapping[int, str] | None = None, origin: ImageSource | None = None
    ) -> None:
        if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
            raise TypeError(
                f"images must be uint8 (N, C, H, W), or float32 for rasters; got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        self.images = images
        self.dtype = images.dtype
        self.bad = dict(bad or {})
        self.origin = origin
        self.channels = images.shape[1]
        self.size = (images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return self.images.shape[0]

    def get(self, indices: Sequence[int]) -> Tensor:
        if self.bad:
            for row in indices:
                if row in self.bad:
                    raise BadImageError(self.bad[row])
        return self.images[torch.as_tensor(indices, dtype=torch.int64)]

    def name(self, row: int) -> str:
        return super().name(row) if self.origin is None else self.origin.name(row)

    def reading(self) -> tuple[object, ...]:
        return super().reading() if self.origin is None else self.origin.reading()

    def files(self) -> Iterable[str]:
        return super().files() if self.origin is None else self.origin.files()

    def other(self, files: Sequence[str]) -> ImageSource:
        return super().other(files) if self.origin is None else self.origin.other(files)

    def subset(self, rows: np.ndarray) -> MemorySource:
        bad = {new: self.bad[int(old)] for new, old in enumerate(rows) if int(old) in self.bad}
        origin = None if self.origin is None else self.origin.subset(rows)
        return MemorySource(self.images[torch.as_tensor(rows, dtype=torch.int64)], bad, origin)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """As the origin has them."""
        return super().pictures(indices) if self.origin is None else self.origin.pictures(indices)


def checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """``(height, width)``; raises ``ValueError`` unless both are at least 1 pixel."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    return size


class DecodingSource(ImageSource):
    """Base of the sources that decode one image at a time.

    Args:
        channels: 3 (RGB) or 1 (grey); every image is converted.
        image_size: side or ``(height, width)`` to resize to; ``None`` keeps the stored size, which
            must then be the same for all images.
        fit: ``"crop"`` scales the short side and cuts the centre, ``"squash"`` ignores the aspect.
    """

    def __init__(self, channels: int = 3, image_size: int | tuple[int, int] | None = None, fit: Fit = "crop"):
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
        if fit not in ("crop", "squash"):
            raise ValueError(f"fit must be 'crop' or 'squash', got {fit!r}")
        self.channels = channels
        self.size = checked_size(image_size)
        self.fit: Fit = fit

    def reading(self) -> tuple[object, ...]:
        return type(self).__name__, self.channels, self.size, self.fit

    def other(self, files: Sequence[str]) -> FileSource:
        return FileSource(files, self.channels, stored_size(self), self.fit)

    @abstractmethod
    def open(self, row: int) -> Image.Image:
        """The undecoded Pillow image of a row; may raise ``OSError``."""

    def get(self, indices: Sequence[int]) -> Tensor:
        images = [self.decode(row) for row in indices]
        if self.size is None:
            for row, image in zip(indices, images, strict=True):
                if image.shape != images[0].shape:
                    raise ValueError(
                        f"{self.name(row)} is {tuple(image.shape[1:])} but {self.name(indices[0])} is "
                        f"{tuple(images[0].shape[1:])}: set image_size to bring all images to one size"
                    )
        if not images:
            return torch.empty((0, self.channels, *(self.size or (0, 0))), dtype=torch.uint8)
        return torch.stack(images)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """Larger than the net sees them where that is too small for people."""
        if self.size is None or max(self.size) >= PICTURE:
            return self.get(indices)
        larger = copy(self)
        larger.size = tuple(PICTURE * side // max(self.size) for side in self.size)  # type: ignore[assignment]
        return larger.get(indices)

    def decode(self, row: int) -> Tensor:
        """One image as uint8 ``(channels, H, W)``."""
        try:
            with self.open(row) as image:
                return to_tensor(image, self.channels, self.size, self.fit)
        except DECODE_ERRORS as error:
            raise BadImageError(
                f"cannot read {self.name(row)} ({type(error).__name__}: {error}); mend or remove it, "
                "or set on_bad_image: skip"
            ) from error


class JpegSource(DecodingSource):
    """Encoded images end to end in one byte array (any format that Pillow reads).

    Args:
        buffer: uint8 ``(bytes,)``.
        offsets: int64 ``(M + 1,)``; image i is ``buffer[offsets[i]:offsets[i + 1]]``.
        rows: which images, in which order; default all.
        origin: file name for messages.
        channels, image_size, fit: see :class:`DecodingSource`.
    """

    def __init__(
        self,
        buffer: np.ndarray,
        offsets: np.ndarray,
        rows: np.ndarray | None = None,
        origin: str = "the array",
        channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "crop",
    ) -> None:
        super().__init__(channels, image_size, fit)
        if offsets.dtype.kind not in "iu":
            raise ValueError(f"offsets of {origin} must be whole numbers such as int64, got {offsets.dtype}")
        offsets = offsets.astype(np.int64)  # differences of unsigned ones never fall
        if len(offsets) < 1 or offsets[0] < 0 or offsets[-1] > len(buffer) or np.any(np.diff(offsets) < 0):
            raise ValueError(f"offsets of {origin} must rise from 0 to at most {len(buffer)}, the bytes held")
        self.buffer, self.offsets, self.origin = buffer, offsets, origin
        self.rows = np.arange(len(offsets) - 1) if rows is None else np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        return f"image {int(self.rows[row])} of {self.origin}"

    def open(self, row: int) -> Image.Image:
        i = int(self.rows[row])
        return Image.open(io.BytesIO(self.buffer[self.offsets[i] : self.offsets[i + 1]].tobytes()))

    def subset(self, rows: np.ndarray) -> JpegSource:
        return JpegSource(
            self.buffer, self.offsets, self.rows[rows], self.origin, self.channels, self.size, self.fit
        )


class FileSource(DecodingSource):
    """Image files on disk.

    Args:
        paths: one per image.
        channels, image_size, fit: see :class:`DecodingSource`.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "crop",
    ) -> None:
        super().__init__(channels, image_size, fit)
        # an array of fixed-width strings: forked workers do not copy it by touching reference counts
        self.paths = np.asarray([str(p) for p in paths], dtype=np.str_)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def open(self, row: int) -> Image.Image:
        return Image.open(str(self.paths[row]))

    def subset(self, rows: np.ndarray) -> FileSource:
        return FileSource(self.paths[rows].tolist(), self.channels, self.size, self.fit)

    def files(self) -> Iterable[str]:
        return map(str, self.paths)

    def missing(self) -> list[int]:
        return [row for row, path in enumerate(self.paths) if not Path(path).is_file()]


def decoded_bytes(source: ImageSource) -> int:
    """Memory that all images of a source take once decoded, judged by the first if no size is set."""
    height, width = stored_size(source)
    return len(source) * source.channels * height * width * source.dtype.itemsize


def stored_size(source: ImageSource) -> tuple[int, int]:
    """``(height, width)`` of the images: as set, else that of the first readable one."""
    if source.size is not None:
        return source.size
    for row in range(len(source)):
        try:
            height, width = source.get([row]).shape[2:]
        except BadImageError:
            continue
        return int(height), int(width)
    raise BadImageError(f"none of the {len(source)} images can be read, such as {source.name(0)}")


def cached(source: ImageSource, on_bad_image: Literal["raise", "skip"] = "raise") -> MemorySource:
    """Decode a whole source into memory, on a few threads (Pillow frees the interpreter lock).

    Raises:
        BadImageError: an image cannot be read and ``on_bad_image`` is ``"raise"``; with ``"skip"``
            the row is remembered as bad and raises when it is asked for.
    """
    if isinstance(source, MemorySource):
        return source
    bad: dict[int, str] = {}

    def one(row: int) -> Tensor | None:
        try:
            return source.get([row])[0]
        except BadImageError as error:
            if on_bad_image == "raise":
                raise
            bad[row] = str(error)
            return None

    images: Tensor | None = None
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for row, image in enumerate(pool.map(one, range(len(source)))):
            if image is None:
                continue
            if images is None:
                images = torch.zeros((len(source), *image.shape), dtype=image.dtype)
            if image.shape != images.shape[1:]:
                raise ValueError(f"{source.name(row)} differs in size from the others: set image_size")
            images[row] = image
    if images is None:
        raise BadImageError(f"none of the {len(source)} images can be read, the first: {bad.get(0)}")
    return MemorySource(images, bad, source)


def pixel_embedding(images: ImageSource, side: int = 16, rows: int = 1024) -> np.ndarray:
    """Unit rows of pooled, centred pixels ``(N, channels * side**2)`` float32: a net-free embedding.

    Serves small-cluster noise, which only asks that images that look alike lie close together.
    """
    parts = []
    for start in range(0, len(images), rows):
        batch = images.get(range(start, min(start + rows, len(images)))).float()
        pooled = F.adaptive_avg_pool2d(batch, min(side, *batch.shape[2:])).flatten(1)
        parts.append(F.normalize(pooled - pooled.mean(1, keepdim=True), dim=1))
    return torch.cat(parts).numpy()
