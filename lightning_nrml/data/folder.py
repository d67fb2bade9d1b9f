"""Images in folders named by class."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.decode import Fit
from lightning_nrml.data.image_files import IMAGE_SUFFIXES, image_files
from lightning_nrml.data.sources import FileSource
from lightning_nrml.data.splits import SPLIT_NAMES, Split, Splits, join_splits, split_by_rows

#: other names of splits, which are hardly classes if there are no others
_LIKE_SPLITS = {*SPLIT_NAMES, "training", "valid", "validation", "dev", "testing"}


class FolderDataModule(NRMLDataModule):
    """``root/<class>/**/<image>``, or the same below ``root/train``, ``root/val`` and ``root/test``.

    With split folders, the classes of val and test must either all occur in train, or none of them
    (zero-shot). Without, ``split`` says how to divide: ``"classes"`` trains on the first classes in
    sorted order and tests on the others, as is usual for CUB and Cars; ``"images"`` divides the images of
    every class at random.

    Args:
        root: the folder.
        split: how to divide a single folder of classes.
        train_fraction: share of the classes or images that train, inside (0, 1).
        split_seed: of ``split="images"``.
        image_size: side of the square that images are brought to.
        channels: 3 (RGB) or 1 (grey).
        fit: ``"crop"`` cuts the centre square, ``"squash"`` ignores the aspect ratio.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(
        self,
        root: str,
        split: Literal["classes", "images"] = "classes",
        train_fraction: float = 0.5,
        split_seed: int = 0,
        image_size: int = 224,
        channels: int = 3,
        fit: Fit = "crop",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if split not in ("classes", "images"):
            raise ValueError(f"split must be 'classes' or 'images', got {split!r}")
        if not 0 < train_fraction < 1:
            raise ValueError(f"train_fraction must lie inside (0, 1), got {train_fraction}")
        self.root, self.split, self.train_fraction, self.split_seed = root, split, train_fraction, split_seed
        self.image_size, self.channels, self.fit = image_size, channels, fit

    def load_splits(self) -> Splits:
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}; FolderDataModule reads class folders of images there")
        if (root / "train").is_dir():
            return self._split_folders(root)
        paths, label, names = list_classes(root)
        if all(name.lower() in _LIKE_SPLITS for name in names):
            raise ValueError(
                f"{root} has the folders {', '.join(names)}: if these are splits, call them train, val and "
                "test; if they are classes, put them into a folder 'train'"
            )
        rows = self._rows(label, len(names))
        return split_by_rows(self._source(root, paths), label, rows, names, str(root), paths=paths)

    def _split_folders(self, root: Path) -> Splits:
        others = [path.name for path in _folders(root) if path.name not in SPLIT_NAMES]
        if others:
            warnings.warn(
                f"{root / 'train'} makes {root} a folder of splits, of which {', '.join(SPLIT_NAMES)} are "
                f"read, and not {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}; rename these if "
                "they are splits, or 'train' if it is a class",
                stacklevel=2,
            )
        found = {name: list_classes(root / name) for name in SPLIT_NAMES if (root / name).is_dir()}
        names = sorted({name for _, _, classes in found.values() for name in classes})
        number = {name: i for i, name in enumerate(names)}
        parts = {}
        for part, (paths, label, classes) in found.items():
            paths = [f"{part}/{path}" for path in paths]
            label = np.asarray([number[name] for name in classes])[label]
            parts[part] = Split(self._source(root, paths), label, paths=paths)
        return join_splits(parts, names, str(root))

    def _source(self, root: Path, paths: list[str]) -> FileSource:
        return FileSource([root / path for path in paths], self.channels, self.image_size, self.fit)

    def _rows(self, label: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
        if self.split == "classes":
            if num_classes < 2:
                raise ValueError(f"split='classes' needs at least 2 class folders in {self.root}, found 1")
            train_classes = min(max(round(self.train_fraction * num_classes), 1), num_classes - 1)
            return {
                "train": np.flatnonzero(label < train_classes),
                "test": np.flatnonzero(label >= train_classes),
            }
        rng = np.random.default_rng(self.split_seed)
        train = []
        for c in range(num_classes):
            members = rng.permutation(np.flatnonzero(label == c))
            train.append(members[: max(round(self.train_fraction * len(members)), 1)])
        chosen = np.sort(np.concatenate(train))
        return {"train": chosen, "test": np.setdiff1d(np.arange(len(label)), chosen)}


def _folders(root: Path) -> list[Path]:
    """The folders of ``root`` in sorted order, but for hidden ones."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_classes(root: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Image paths relative to ``root``, their labels ``(N,)``, and the class names, all in sorted order.

    Raises:
        ValueError: no class folder with images.
    """
    paths: list[str] = []
    label: list[int] = []
    names: list[str] = []
    empty: list[str] = []
    for folder in _folders(root):
        images = sorted(path.relative_to(root).as_posix() for path in image_files(folder))
        if not images:
            empty.append(folder.name)
            continue
        paths += images
        label += [len(names)] * len(images)
        names.append(folder.name)
    if not names:
        raise ValueError(
            f"{root} has no class folders with images ({', '.join(sorted(IMAGE_SUFFIXES))}); "
            "the layout is <root>/<class>/<image>, or <root>/train/all/<image> for images without labels"
        )
    if empty:
        warnings.warn(
            f"{len(empty)} folders of {root} have no images, such as {empty[0]}: left out", stacklevel=2
        )
    return paths, np.asarray(label, dtype=np.int64), names
