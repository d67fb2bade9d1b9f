"""Reading ``.npz`` files with errors that help."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_nrml.data.decode import Fit
from lightning_nrml.data.sources import ImageSource, JpegSource, MemorySource
from lightning_nrml.data.splits import Splits

IMAGE_KEYS = ("image", "images")


class Npz:
    """An open ``.npz`` without pickles.

    Args:
        path: the file.
        origin: where the data comes from, for the message if the file is absent.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an npz file.
    """

    def __init__(self, path: str | Path, origin: str = "check the path") -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}; {origin}")
        try:
            file = np.load(self.path, allow_pickle=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            # NumPy takes any other file for a pickle and suggests to load it unsafely
            raise ValueError(
                f"{self.path} is no readable npz: it is damaged, incomplete or of another kind; make it with "
                "numpy.savez"
            ) from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"{self.path} holds a single array; an npz with named arrays is needed")
        self._file = file

    def __contains__(self, key: str) -> bool:
        return key in self._file.files

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self:
            raise KeyError(f"{self.path} has no array '{key}'; it has {', '.join(sorted(self._file.files))}")
        try:
            array: np.ndarray = self._file[key]
        except ValueError as error:
            # of dtype object; NumPy's own words suggest to load it unsafely
            raise ValueError(
                f"array '{key}' of {self.path} cannot be read ({error}); Python objects are not, for they "
                "can run code: save numbers or text, such as by astype(str)"
            ) from error
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise ValueError(
                f"array '{key}' of {self.path} is damaged ({error}); copy or make the file again"
            ) from error
        return array

    def first(self, keys: Sequence[str]) -> str | None:
        """The first of ``keys`` that the file has."""
        return next((key for key in keys if key in self), None)

    def names(self, key: str = "class_names") -> list[str] | None:
        """An array of strings, if the file has it."""
        return [str(name) for name in self[key]] if key in self else None


def images_of(
    npz: Npz,
    image_key: str | None,
    jpeg_key: str,
    offsets_key: str,
    image_size: int | tuple[int, int] | None,
    fit: Fit = "crop",
    channels: int = 3,
    image_keys: Sequence[str] = IMAGE_KEYS,
) -> ImageSource:
    """The images of a file: encoded if ``jpeg_key`` is there, else a plain array.

    Args:
        image_key: name of the plain array (N, H, W[, C]); ``None`` tries ``image_keys``.
        image_size, fit, channels: of encoded images, see :class:`~.sources.DecodingSource`. A plain
            array is resized to ``image_size`` (its sides are squashed).
    """
    if image_key is None and jpeg_key in npz:
        return JpegSource(npz[jpeg_key], npz[offsets_key], None, str(npz.path), channels, image_size, fit)
    key = image_key or npz.first(image_keys) or image_keys[0]
    return MemorySource(resize(as_images(npz[key], f"{key} of {npz.path}"), image_size))


def as_images(array: np.ndarray, where: str) -> Tensor:
    """``(N, H, W)`` or ``(N, H, W, C)`` uint8, or floats in [0, 1], as uint8 ``(N, C, H, W)``."""
    if array.ndim not in (3, 4):
        raise ValueError(f"{where} must be (N, H, W) or (N, H, W, C), got shape {array.shape}")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min(initial=0) < 0 or array.max(initial=0) > 1:
            raise ValueError(f"{where} is floating, so its values must be finite and within 0 to 1")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{where} must be uint8, or floating within 0 to 1, got {array.dtype}")
    if array.ndim == 4 and _channels_first(*array.shape[1:]):
        raise ValueError(
            f"{where} has shape {array.shape}, which looks like (N, C, H, W), but (N, H, W, C) is read; "
            "turn it by numpy.moveaxis(images, 1, -1)"
        )
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images.unsqueeze(1) if array.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _channels_first(height: int, width: int, channels: int) -> bool:
    """Whether these are hardly sides and channels: a strip of colours, or as many channels as columns."""
    return channels > 4 and (height <= 4 < width or height < width == channels)


def resize(images: Tensor, image_size: int | tuple[int, int] | None, rows: int = 2048) -> Tensor:
    """uint8 ``(N, C, H, W)`` to another size, antialiased bilinear."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is None or tuple(images.shape[2:]) == tuple(size):
        return images
    return torch.cat(
        [
            torch.nn.functional.interpolate(part, size=tuple(size), mode="bilinear", antialias=True)
            for part in images.split(rows)
        ]
    )


def use_noise_list(splits: Splits, spec: str, beside: Path) -> None:
    """Put given train labels from a list of noisy labels, checked against the clean ones.

    Args:
        splits: with clean train labels 0..C-1 in file order; changed in place.
        spec: ``"file.npz:array"``, e.g. ``"noise_lists.npz:given_r0.5_s0"``. The file is looked up
            as it is, then beside the data file. If it has ``clean_label``, that must equal the train labels.
        beside: the data file.

    Raises:
        FileNotFoundError, KeyError, ValueError: no such list, or one of other data.
    """
    if splits.train.clean_label is not None:
        raise ValueError("noise_list and clean_label_key both say what the wrong train labels are: give one")
    clean = splits.train.label
    name, _, key = spec.rpartition(":")
    if not name:
        raise ValueError(
            f"noise_list {spec!r} must be 'file.npz:array', such as noise_lists.npz:given_r0.5_s0"
        )
    path = Path(name).expanduser()
    if not path.is_file() and (beside.parent / path).is_file():
        path = beside.parent / path
    lists = Npz(path, "noise_list names a file relative to where you are, or beside the data")
    given = lists[key].astype(np.int64)
    if len(given) != len(clean):
        raise ValueError(
            f"{key} of {path} has {len(given)} labels but the train split has {len(clean)} images"
        )
    if "clean_label" in lists and not np.array_equal(lists["clean_label"].astype(np.int64), clean):
        raise ValueError(f"clean_label of {path} differs from the train labels: the list is of other data")
    splits.train.label, splits.train.clean_label = given, clean
