"""Data sets in one ``.npz`` file."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.decode import Fit
from lightning_nrml.data.npz import IMAGE_KEYS, Npz, images_of, use_noise_list
from lightning_nrml.data.sources import ImageSource
from lightning_nrml.data.splits import SPLIT_NAMES, Split, Splits, check_labels, join_splits, split_by_rows


class ArrayDataModule(NRMLDataModule):
    """An ``.npz`` with images and integer labels.

    Images are a plain array ``image`` / ``images`` (N, H, W[, C]) or encoded ones end to end:
    ``jpeg`` uint8 bytes and ``offsets`` int64 (N + 1). Which rows train is told by ``split_key``: a
    bool array (True = train, False = test), or an array of "train" / "val" / "test" or 0 / 1 / 2. A
    file with ``train_label`` and ``test_label`` instead has its arrays twice, with the prefixes
    ``train_`` and ``test_`` (``val_`` if there). If no test class occurs in train, the split is zero-shot.
    An array ``class_names`` is used if it is there.

    Args:
        path: the file.
        image_key: name of the plain image array; ``None`` finds it.
        jpeg_key: name of the encoded bytes.
        offsets_key: name of their offsets.
        label_key: name of the labels.
        clean_label_key: name of true labels, if ``label_key`` are noisy ones.
        split_key: name of the array that says which rows train.
        subset: name of a bool array that restricts the evaluation splits (such as ``balanced60``).
        subset_train: let ``subset`` restrict the train split as well.
        noise_list: ``"file.npz:array"`` of given train labels, in file order and numbered 0.. in sorted
            order; the file may lie beside ``path``.
        image_size: side to resize to (antialiased bilinear); ``None`` keeps the size.
        channels: 3 or 1, of encoded images.
        fit: how encoded images that are not square are made so.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(
        self,
        path: str,
        image_key: str | None = None,
        jpeg_key: str = "jpeg",
        offsets_key: str = "offsets",
        label_key: str = "label",
        clean_label_key: str | None = None,
        split_key: str = "train_class",
        subset: str | None = None,
        subset_train: bool = False,
        noise_list: str | None = None,
        image_size: int | None = None,
        channels: int = 3,
        fit: Fit = "crop",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.image_key, self.jpeg_key, self.offsets_key = image_key, jpeg_key, offsets_key
        self.label_key, self.clean_label_key, self.split_key = label_key, clean_label_key, split_key
        self.subset, self.subset_train, self.noise_list = subset, subset_train, noise_list
        self.image_size, self.channels, self.fit = image_size, channels, fit

    def load_splits(self) -> Splits:
        npz = Npz(self.path, "ArrayDataModule reads an npz that you have made or downloaded")
        splits = self._prefixed(npz) if f"train_{self.label_key}" in npz else self._by_rows(npz)
        if self.noise_list is not None:
            use_noise_list(splits, self.noise_list, npz.path)
        return splits

    def _by_rows(self, npz: Npz) -> Splits:
        label = npz[self.label_key]
        rows = split_rows(npz[self.split_key], len(label), f"{self.split_key} of {npz.path}")
        if self.subset is not None:
            chosen = npz[self.subset]
            if chosen.dtype != bool or chosen.shape != (len(label),):
                raise ValueError(f"{self.subset} of {npz.path} must be bool of shape ({len(label)},)")
            for name in rows:
                if name != "train" or self.subset_train:
                    rows[name] = rows[name][chosen[rows[name]]]
        clean = None if self.clean_label_key is None else self._clean(npz, self.clean_label_key)
        return split_by_rows(self._images(npz, ""), label, rows, npz.names(), str(npz.path), clean)

    def _prefixed(self, npz: Npz) -> Splits:
        if self.subset is not None:
            raise ValueError(
                f"subset needs an array {self.split_key}; {npz.path} has its arrays once per split"
            )
        parts = {}
        for name in SPLIT_NAMES:
            key = f"{name}_{self.label_key}"
            if key in npz:
                parts[name] = Split(self._images(npz, f"{name}_"), npz[key])
        if self.clean_label_key is not None:
            parts["train"].clean_label = self._clean(npz, f"train_{self.clean_label_key}")
        return join_splits(parts, npz.names(), str(npz.path))

    def _clean(self, npz: Npz, key: str) -> np.ndarray:
        """True labels, all of which must be known: -1 may mean unknown, and would count as wrong."""
        return check_labels(npz[key], None, f"{npz.path}, {key}")

    def _images(self, npz: Npz, prefix: str) -> ImageSource:
        key = None if self.image_key is None else prefix + self.image_key
        return images_of(
            npz,
            key,
            prefix + self.jpeg_key,
            prefix + self.offsets_key,
            self.image_size,
            self.fit,
            self.channels,
            [prefix + name for name in IMAGE_KEYS],
        )


def split_rows(array: np.ndarray, num_rows: int, where: str) -> dict[str, np.ndarray]:
    """Row numbers of each split from a bool array, names, or the codes 0 / 1 / 2.

    Raises:
        ValueError: wrong shape, or an entry that names no split.
    """
    if array.shape != (num_rows,):
        raise ValueError(f"{where} must have shape ({num_rows},), got {array.shape}")
    if array.dtype == bool:
        return {"train": np.flatnonzero(array), "test": np.flatnonzero(~array)}
    allowed = list(SPLIT_NAMES) if array.dtype.kind in "UO" else [0, 1, 2]
    known = np.isin(array, allowed)
    if not known.all():
        row = int(np.argmin(known))
        raise ValueError(
            f"{where}, row {row}: {array[row]!r}; a split is one of {', '.join(map(str, allowed))}"
        )
    rows = {name: np.flatnonzero(array == code) for name, code in zip(SPLIT_NAMES, allowed, strict=True)}
    if array.dtype.kind not in "UO" and len(rows["val"]) and not len(rows["test"]):
        warnings.warn(
            f"{where} holds no 2: 0 is read as train and 1 as val; if 1 means train, make it bool",
            stacklevel=2,
        )
    return {name: at for name, at in rows.items() if name == "train" or len(at)}
