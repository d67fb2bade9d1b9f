"""A labelled split, the checks on it, and the dataset that serves it in whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_nrml.data.sources import BadImageError, ImageSource
from lightning_nrml.types import Batch

OnBadImage = Literal["raise", "skip"]


@dataclass(slots=True)
class Split:
    """Images with labels.

    Args:
        images: N images.
        label: ``(N,)`` integers (or ``(N, L)`` 0/1) as given.
        clean_label: the true labels if they are known and differ from ``label``.
        paths: names of the images for tables and galleries.
    """

    images: ImageSource
    label: np.ndarray
    clean_label: np.ndarray | None = None
    paths: list[str] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def subset(self, rows: np.ndarray) -> Split:
        """The split restricted to ``rows`` (int64 positions), in that order."""
        return Split(
            self.images.subset(rows),
            self.label[rows],
            None if self.clean_label is None else self.clean_label[rows],
            None if self.paths is None else [self.paths[i] for i in rows],
        )


@dataclass(slots=True)
class Splits:
    """What a datamodule loads.

    Args:
        train: labels are 0..num_classes-1.
        val: ``None`` = the test split serves for validation.
        test: ``None`` = there is nothing to evaluate on.
        num_classes: classes (or label columns) of the training set.
        class_names: their names, in label order.
        zero_shot: the classes of val and test do not occur in train, so their labels are free.
    """

    train: Split
    test: Split | None
    num_classes: int
    val: Split | None = None
    class_names: list[str] | None = None
    zero_shot: bool = False


def check_labels(label: np.ndarray, num_classes: int | None, where: str) -> np.ndarray:
    """Labels as int64.

    Args:
        label: ``(N,)`` or ``(N, L)`` numbers.
        num_classes: upper bound (exclusive); ``None`` = any non-negative integer. Multi-label
            matrices must hold 0 and 1.
        where: what to call the labels in a message.

    Raises:
        ValueError: naming the first bad row.
    """
    array = np.asarray(label)
    if array.ndim not in (1, 2):
        raise ValueError(f"{where}: labels must be (N,) or (N, L), got shape {array.shape}")
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{where}: labels must be integers, got {array.dtype}")
    upper = 2 if array.ndim == 2 else num_classes
    bad = np.zeros(array.shape, dtype=bool)
    if array.dtype.kind == "f":
        bad |= ~np.isfinite(array) | (np.nan_to_num(array) % 1 != 0)
    bad |= array < 0
    if upper is not None:
        bad |= array >= upper
    if bad.any():
        row = tuple(int(i) for i in np.argwhere(bad)[0])
        allowed = "non-negative integers" if upper is None else f"integers from 0 to {upper - 1}"
        raise ValueError(
            f"{where}: label {array[row]} at row {row[0]} is not accepted ({int(bad.sum())} such); "
            f"labels must be {allowed}"
        )
    return array.astype(np.int64)


def split_by_rows(
    images: ImageSource,
    label: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    val: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    where: str = "the data set",
) -> Splits:
    """Cut one labelled set into splits and number the training classes 0..C-1 in sorted order.

    If no test class occurs in train the split is zero-shot and evaluation labels stay as they are;
    if all do, they are renumbered alike.

    Args:
        images, label, paths: N rows; ``class_names`` is indexed by the labels given here.
        train, test, val: int64 row numbers of the splits.
        where: for messages.

    Raises:
        ValueError: a label is no class, a split is empty, or the test classes are partly seen and
            partly unseen.
    """
    label = check_labels(label, None if class_names is None else len(class_names), where)
    full = Split(images, label, paths=None if paths is None else list(paths))
    parts = {"train": train, "test": test} | ({} if val is None else {"val": val})
    splits = {name: full.subset(np.asarray(rows, dtype=np.int64)) for name, rows in parts.items()}
    for name, part in splits.items():
        if len(part) == 0:
            raise ValueError(f"{where}: the {name} split is empty")
    classes = np.unique(splits["train"].label)
    unseen = {name: np.setdiff1d(part.label, classes) for name, part in splits.items() if name != "train"}
    zero_shot = len(unseen["test"]) == len(np.unique(splits["test"].label))
    for name, extra in unseen.items():
        seen = len(np.unique(splits[name].label)) - len(extra)
        if (zero_shot and seen > 0) or (not zero_shot and len(extra) > 0):
            raise ValueError(
                f"{where}: {len(extra)} of the {name} classes ({_names(extra, class_names)}) do not occur in "
                f"train but {seen} do; evaluation classes must be all seen or all unseen"
            )
    for name, part in splits.items():
        if name == "train" or not zero_shot:
            part.label = np.searchsorted(classes, part.label)
    names = None if class_names is None else [str(class_names[i]) for i in classes]
    return Splits(
        splits["train"],
        splits["test"],
        len(classes),
        splits.get("val"),
        class_names=names,
        zero_shot=zero_shot,
    )


def _names(classes: np.ndarray, class_names: Sequence[str] | None) -> str:
    shown = [str(c) if class_names is None else str(class_names[c]) for c in classes[:5]]
    return ", ".join(shown) + (", ..." if len(classes) > 5 else "")


class IndexedDataset(Dataset[Batch]):
    """Serves a split in whole batches: ``ds.__getitems__([3, 1]) -> Batch`` (use :func:`identity`).

    A training row whose image turns out to be unreadable under ``on_bad_image="skip"`` is replaced
    by another row as a whole - image, labels and index - preferably of the same given label, so that
    a worker never dies, batches keep their size and class structure, and nothing is recorded under
    the wrong index. In an evaluated split the row is left out of its batch instead, for a substitute
    would count twice.

    Args:
        split: images and labels.
        on_bad_image: ``"raise"`` or ``"skip"``.
        replace: substitute unreadable rows (train) instead of leaving them out (evaluation).
        bad_list: text file that receives one line per unreadable image; every worker appends.
    """

    def __init__(
        self,
        split: Split,
        on_bad_image: OnBadImage = "raise",
        replace: bool = False,
        bad_list: Path | None = None,
    ) -> None:
        self.images = split.images
        self.label = torch.as_tensor(split.label)
        self.clean_label = None if split.clean_label is None else torch.as_tensor(split.clean_label)
        self.on_bad_image, self.replace, self.bad_list = on_bad_image, replace, bad_list
        self._substitute: dict[int, int | None] = {}

    def __len__(self) -> int:
        return self.label.shape[0]

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([index])
        return Batch(**{key: value[0] for key, value in batch.items()})  # type: ignore[typeddict-item, index]

    def __getitems__(self, indices: list[int]) -> Batch:
        try:
            images, rows = self.images.get(indices), list(indices)
        except BadImageError:
            if self.on_bad_image == "raise":
                raise
            images, rows = self._get_readable(indices)
        index = torch.as_tensor(rows, dtype=torch.int64)
        batch = Batch(image=images, label=self.label[index], index=index)
        if self.clean_label is not None:
            batch["clean_label"] = self.clean_label[index]
        return batch

    def _get_readable(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        images, rows = [], []
        for index in indices:
            row: int | None = self._substitute.get(index, index)
            if row is None:
                continue
            try:
                image = self.images.get([row])
            except BadImageError as error:
                self._record(index, str(error))
                found = self._find_substitute(index) if self.replace else None
                self._substitute[index] = None if found is None else found[0]
                if found is None:
                    continue
                row, image = found
            images.append(image)
            rows.append(row)
        # all unreadable: no rows, but of the right shape
        return (torch.cat(images) if images else self._find_substitute(indices[0])[1][:0]), rows

    def _find_substitute(self, index: int) -> tuple[int, Tensor]:
        """The next readable row, of the same given label if there is one."""
        following = torch.roll(torch.arange(len(self)), -index)[1:]
        same = (self.label[following] == self.label[index]).reshape(len(following), -1).all(1)
        for row in torch.cat([following[same], following[~same]]).tolist():
            try:
                return row, self.images.get([row])
            except BadImageError:
                continue
        raise BadImageError(f"none of the {len(self)} images can be read, such as {self.images.name(index)}")

    def _record(self, index: int, message: str) -> None:
        if self.bad_list is not None:
            with self.bad_list.open("a", encoding="utf-8") as file:
                file.write(f"{index}\t{self.images.name(index)}\t{message}\n")


def identity(batch: Any) -> Any:
    """Collate function of datasets that already return batches."""
    return batch
