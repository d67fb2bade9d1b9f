"""CIFAR-10 and CIFAR-100, and the human label noise of CIFAR-N."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.npz import Npz, images_of
from lightning_nrml.data.sources import ImageSource, MemorySource
from lightning_nrml.data.splits import Split, Splits, join_splits
from lightning_nrml.data.views import EvalView, MetricView, Views

HumanLabel = Literal["clean", "aggre", "worse", "random1", "random2", "random3"]
_ORIGIN = "get the python version from www.cs.toronto.edu/~kriz/cifar.html; nothing is downloaded for you"
_T = TypeVar("_T")
# what unpickling and reading other content raise
_BROKEN = (pickle.UnpicklingError, AttributeError, EOFError, ImportError, LookupError, TypeError, ValueError)
_LAYOUT = {
    10: (
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        "labels",
        "batches.meta",
    ),
    100: ("cifar-100-python", ["train"], "test", "fine_labels", "meta"),
}


class _StandardViews(NRMLDataModule):
    """Default views with the channel statistics of CIFAR's train images."""

    mean, std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)

    def default_train_view(self) -> Views:
        """Crop and flip, standardised."""
        return MetricView(self.view_size, mean=self.mean, std=self.std)

    def default_eval_view(self) -> Views:
        """The whole image, standardised."""
        return EvalView(self.view_size, mean=self.mean, std=self.std)


class CIFARDataModule(_StandardViews):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 train and 10,000 test images of 3 x 32 x 32.

    Args:
        path: a folder with torchvision's layout (``cifar-10-batches-py`` or ``cifar-100-python`` in it, or
            that folder itself), or an npz with ``train_`` and ``test_`` images (``train_image`` or
            ``train_jpeg`` + ``train_offsets``) and labels (``train_label`` or ``clean_label``,
            ``test_label``).
        classes: 10 or 100, for the folder.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(self, path: str, classes: Literal[10, 100] = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if classes not in _LAYOUT:
            raise ValueError(f"classes must be 10 or 100, got {classes}")
        self.path, self.classes = path, classes

    def load_splits(self) -> Splits:
        path = Path(self.path).expanduser()
        if path.is_file():
            npz = Npz(path)
            label = npz[npz.first(("train_label", "clean_label")) or "train_label"]
            return _npz_splits(npz, Split(_npz_images(npz, "train_"), label))
        return self._folder_splits(path)

    def _folder_splits(self, path: Path) -> Splits:
        folder, train, test, key, meta = _LAYOUT[self.classes]
        root = path / folder if (path / folder).is_dir() else path
        name_key = "label_names" if self.classes == 10 else "fine_label_names"
        names = _load(root / meta, lambda loaded: loaded.get(name_key))
        parts = {"train": _read(root, train, key), "test": _read(root, [test], key)}
        return join_splits(parts, names, str(root))


class CIFARNDataModule(_StandardViews):
    """CIFAR-10 with labels that people really gave (Wei et al., ICLR 2022, "CIFAR-10N").

    The file holds ``train_jpeg`` + ``train_offsets`` (or ``train_image``) in torchvision's order,
    ``clean_label``, ``aggre_label`` (majority of three people, 9 % wrong), ``worse_label`` (40 %),
    ``random_label1..3`` (one person each, 17-18 %), and the clean ``test_`` arrays.

    Args:
        path: the npz file.
        label: which labels to train on; ``"clean"`` may be combined with ``noise``.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(self, path: str, label: HumanLabel = "worse", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        keys = {"clean": "clean_label", "aggre": "aggre_label", "worse": "worse_label"}
        keys |= {f"random{i}": f"random_label{i}" for i in (1, 2, 3)}
        if label not in keys:
            raise ValueError(f"label must be one of {', '.join(keys)}, got {label!r}")
        self.path, self.label, self._key = path, label, keys[label]

    def load_splits(self) -> Splits:
        npz = Npz(self.path, "pack the labels of github.com/UCSC-REAL/cifar-10-100n with CIFAR-10's images")
        train = Split(_npz_images(npz, "train_"), npz[self._key])
        if self.label != "clean":
            train.clean_label = npz["clean_label"]
        return _npz_splits(npz, train)


def _npz_images(npz: Npz, prefix: str) -> ImageSource:
    keys = [f"{prefix}image", f"{prefix}images"]
    return images_of(npz, None, f"{prefix}jpeg", f"{prefix}offsets", None, image_keys=keys)


def _npz_splits(npz: Npz, train: Split) -> Splits:
    parts = {"train": train, "test": Split(_npz_images(npz, "test_"), npz["test_label"])}
    return join_splits(parts, npz.names(), str(npz.path))


def _load(path: Path, parse: Callable[[dict[str, Any]], _T]) -> _T:
    """What ``parse`` makes of a pickle, which is the official format."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; {_ORIGIN}")
    try:
        with path.open("rb") as file:
            return parse(pickle.load(file, encoding="latin1"))
    except _BROKEN as error:
        raise ValueError(
            f"{path} is damaged or no file of CIFAR's python version ({type(error).__name__}: {error}); "
            "unpack the archive again"
        ) from error


def _batch(loaded: dict[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``(n, 3, 32, 32)`` images and ``(n,)`` labels."""
    pixels, label = loaded["data"].reshape(-1, 3, 32, 32), np.asarray(loaded[key])
    if len(pixels) != len(label):
        raise ValueError(f"it has {len(pixels)} images but {len(label)} labels")
    return pixels, label


def _read(root: Path, files: list[str], key: str) -> Split:
    pixels, label = zip(*(_load(root / name, partial(_batch, key=key)) for name in files), strict=True)
    return Split(MemorySource(torch.from_numpy(np.concatenate(pixels))), np.concatenate(label))
