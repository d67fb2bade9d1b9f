"""Labelled splits: what a datamodule loads, the checks on it, and how classes are numbered."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_nrml.data.noise import NoisyLabels
from lightning_nrml.data.sources import ImageSource

SPLIT_NAMES = ("train", "val", "test")


@dataclass(slots=True)
class Split:
    """Images with labels.

    Args:
        images: N images.
        label: ``(N,)`` integers (or ``(N, L)`` 0/1) as given.
        clean_label: the true labels if they are known and differ from ``label``; -1 = none of the classes.
        paths: names of the images for tables and galleries.
        keep: ``(N,)`` bool, False = the set's own table or a label table leaves the sample out of training;
            ``None`` = all are kept.
    """

    images: ImageSource
    label: np.ndarray
    clean_label: np.ndarray | None = None
    paths: list[str] | None = None
    keep: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    def subset(self, rows: np.ndarray) -> Split:
        """The split restricted to ``rows`` (int64 positions), in that order."""
        return Split(
            self.images.subset(rows),
            self.label[rows],
            None if self.clean_label is None else self.clean_label[rows],
            None if self.paths is None else [self.paths[i] for i in rows],
            None if self.keep is None else self.keep[rows],
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

    def items(self) -> Iterator[tuple[str, Split]]:
        """Name and split of those that exist."""
        for name in SPLIT_NAMES:
            split: Split | None = getattr(self, name)
            if split is not None:
                yield name, split


def check_labels(label: np.ndarray, num_classes: int | None, where: str, lowest: int = 0) -> np.ndarray:
    """Labels as int64.

    Args:
        label: ``(N,)`` or ``(N, L)`` numbers.
        num_classes: upper bound (exclusive); ``None`` = no bound. Multi-label matrices must hold 0 and 1.
        where: what to call the labels in a message.
        lowest: lower bound; -1 for clean labels, of which that means none of the classes.

    Raises:
        ValueError: naming the first bad row.
    """
    array = np.asarray(label)
    if array.ndim not in (1, 2):
        raise ValueError(f"{where}: labels must be (N,) or (N, L), got shape {array.shape}")
    if array.dtype.kind not in "iufb":
        raise ValueError(
            f"{where}: labels must be integers, got {array.dtype}; number the classes 0, 1, ... "
            "(their names may stand in class_names)"
        )
    lowest, upper = (0, 2) if array.ndim == 2 else (lowest, num_classes)
    bad = np.zeros(array.shape, dtype=bool)
    if array.dtype.kind == "f":
        bad |= ~np.isfinite(array) | (np.nan_to_num(array) % 1 != 0)
    bad |= array < lowest
    if upper is not None:
        bad |= array >= upper
    if bad.any():
        row = tuple(int(i) for i in np.argwhere(bad)[0])
        allowed = f"integers from {lowest} on" if upper is None else f"integers from {lowest} to {upper - 1}"
        raise ValueError(
            f"{where}: label {array[row]} at row {row[0]} is not accepted ({int(bad.sum())} such); "
            f"labels must be {allowed}"
        )
    return array.astype(np.int64)


def split_by_rows(
    images: ImageSource,
    label: np.ndarray,
    rows: Mapping[str, np.ndarray],
    class_names: Sequence[str] | None = None,
    where: str = "the data set",
    clean_label: np.ndarray | None = None,
    paths: Sequence[str] | None = None,
    keep: np.ndarray | None = None,
) -> Splits:
    """Cut one labelled set into splits; see :func:`join_splits` for the numbering of the classes.

    Args:
        images, label, clean_label, paths, keep: N rows; evaluation uses the clean labels if there are any. A
            split whose clean labels are all -1 has none.
        rows: row numbers by ``"train"``, ``"val"`` and ``"test"``; the latter two may be absent.
        class_names: names by label.
        where: what to call the data in messages.
    """
    if len(images) != len(label):
        raise ValueError(f"{where} has {len(images)} images but {len(label)} labels")
    full = Split(images, np.asarray(label), clean_label, None if paths is None else list(paths), keep)
    parts = {
        name: full.subset(np.asarray(rows[name], dtype=np.int64)) for name in SPLIT_NAMES if name in rows
    }
    for name, part in parts.items():
        if part.clean_label is not None and (part.clean_label == -1).all():
            part.clean_label = None
        elif name != "train" and part.clean_label is not None:
            part.label, part.clean_label = part.clean_label, None
    return join_splits(parts, class_names, where)


def join_splits(
    parts: Mapping[str, Split], class_names: Sequence[str] | None = None, where: str = "the data set"
) -> Splits:
    """Number the training classes 0..C-1 in sorted order and find out how the splits relate.

    If no evaluation class occurs in train the splits are zero-shot and evaluation labels stay as they
    are; if all do, they are renumbered alike.

    Args:
        parts: splits with single labels of one common numbering, which ``class_names`` follows.
        where: what to call the data in messages.

    Raises:
        ValueError: a label is no class, a split is empty, there are several labels per image, or evaluation
            classes are partly seen and partly unseen in training.
    """
    bound = None if class_names is None else len(class_names)
    for name, part in parts.items():
        _check_lengths(part, name, where)
        if np.ndim(part.label) != 1:
            raise ValueError(
                f"{where}, {name}: labels of one class per image have shape (N,), but these have "
                f"{np.shape(part.label)}; take label[:, 0] of one column, label.argmax(1) of one-hot rows"
            )
        part.label = check_labels(part.label, bound, f"{where}, {name}")
        if part.clean_label is not None:
            source = f"{where}, clean labels of {name}"
            part.clean_label = check_labels(part.clean_label, bound, source, lowest=-1)
    train = parts["train"]
    classes = np.unique(train.label if train.clean_label is None else [train.label, train.clean_label])
    classes = classes[classes >= 0]
    held_out = {name: np.unique(part.label) for name, part in parts.items() if name != "train"}
    unseen = {name: np.setdiff1d(present, classes) for name, present in held_out.items()}
    zero_shot = bool(unseen) and all(len(unseen[name]) == len(held_out[name]) for name in unseen)
    for name, extra in unseen.items():
        if len(extra) and not zero_shot:
            raise ValueError(
                f"{where}: {len(extra)} of {len(held_out[name])} {name} classes do not occur in train "
                f"({_shown(extra, class_names)}); the classes of val and test must be all seen in train, "
                "or all unseen"
            )
    for name, part in parts.items():
        if name == "train" or not zero_shot:
            part.label = np.searchsorted(classes, part.label)
        if part.clean_label is not None:
            part.clean_label = np.where(part.clean_label < 0, -1, np.searchsorted(classes, part.clean_label))
    names = None if class_names is None else [str(class_names[i]) for i in classes]
    return Splits(train, parts.get("test"), len(classes), parts.get("val"), names, zero_shot)


def _shown(classes: np.ndarray, class_names: Sequence[str] | None) -> str:
    shown = [str(c) if class_names is None else str(class_names[c]) for c in classes[:5]]
    return ", ".join(shown) + (", ..." if len(classes) > 5 else "")


def check_splits(splits: Splits, where: str) -> None:
    """Bring labels to int64 and see that images, labels and classes agree.

    Raises:
        ValueError: an empty split, unequal lengths, images of another kind than the train images, a name that
            is no text, or a label out of range.
    """
    for name, split in splits.items():
        _check_lengths(split, name, where)
        _check_kind(split.images, splits.train.images, name, where)
        _check_names(split.paths or (), name, where)
        bound = splits.num_classes if name == "train" or not splits.zero_shot else None
        split.label = check_labels(split.label, bound, f"{where}, {name}")
        if split.clean_label is not None:
            source = f"{where}, clean labels of {name}"
            split.clean_label = check_labels(split.clean_label, bound, source, lowest=-1)


def _check_lengths(split: Split, name: str, where: str) -> None:
    if len(split) == 0:
        raise ValueError(f"{where}: the {name} split is empty")
    if len(split.images) != len(split):
        raise ValueError(f"{where}: {name} has {len(split.images)} images but {len(split)} labels")
    if split.clean_label is not None and len(split.clean_label) != len(split):
        raise ValueError(
            f"{where}: {name} has {len(split)} labels but {len(split.clean_label)} clean labels; give one of "
            "each per image"
        )


def _check_names(paths: Sequence[str], name: str, where: str) -> None:
    """Refuse file names in another encoding now: no ledger could be written at the end of training."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: the name of the {name} image {path!a} is not in UTF-8, so no table can hold it; "
                "rename the file (convmv does so for whole folders)"
            ) from error


def _check_kind(images: ImageSource, train: ImageSource, name: str, where: str) -> None:
    """One network is to read both, and uint8 is scaled to [0, 1] where float32 stays as it is."""
    if (images.channels, images.dtype) != (train.channels, train.dtype):
        found, wanted = (
            f"{source.channels}{unit} of {str(source.dtype).removeprefix('torch.')} ({source.name(0)})"
            for source, unit in ((images, ""), (train, " channel(s)"))
        )
        raise ValueError(
            f"{where}: the train images have {wanted}, but the {name} images {found}; give all splits the "
            "same kind of files"
        )


def combined_keep(train: Split, noisy: NoisyLabels) -> np.ndarray | None:
    """``(N,)`` bool, the samples that both the data set and the label table keep; ``None`` = all."""
    if train.keep is None or noisy.keep is None:
        return noisy.keep if train.keep is None else train.keep
    keep = train.keep & noisy.keep
    if not keep.any():
        raise ValueError(
            "the label table keeps only samples that the data set leaves out, so none is left to train on; "
            "correct the column 'keep' of one of them"
        )
    return keep


def put_noise(splits: Splits, noisy: NoisyLabels) -> None:
    """Replace the train labels; where noise dissolved classes, number the remaining ones anew.

    Raises:
        ValueError: none of the classes of an evaluation split remains, or no sample is left to train on.
    """
    # in the numbering of the given labels, so that "label != clean_label" always means wrong
    splits.train.label = noisy.label.copy()
    splits.train.clean_label = noisy.true_label.copy() if noisy.known else None
    splits.train.keep = combined_keep(splits.train, noisy)
    if noisy.class_id is None:
        return
    lookup = np.full(splits.num_classes, -1, dtype=np.int64)
    lookup[noisy.class_id] = np.arange(len(noisy.class_id))
    splits.num_classes = len(noisy.class_id)
    if splits.class_names is not None:
        splits.class_names = [splits.class_names[i] for i in noisy.class_id]
    if splits.zero_shot:
        return
    for name, split in splits.items():
        if name != "train":
            # images of dissolved classes have no label any more
            remaining = split.subset(np.flatnonzero(lookup[split.label] >= 0))
            if len(remaining) == 0:
                raise ValueError(
                    f"the noise dissolves all classes of the {name} split, so it has no images left; "
                    "lower noise.rate or take another noise.seed"
                )
            remaining.label = lookup[remaining.label]
            setattr(splits, name, remaining)


def warn_of_single_samples(label: np.ndarray) -> None:
    """Say how many classes have one sample only: allowed, but they have no positive pair."""
    _, counts = np.unique(label, return_counts=True)
    if single := int((counts == 1).sum()):
        warnings.warn(
            f"{single} of {len(counts)} train classes have one sample only, hence no positive pair",
            stacklevel=2,
        )
