"""Write the noisy labels that a datamodule would train on into a table that it, and others, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.multilabel_writing import write_multilabel_table
from lightning_nrml.data.noise import label_hash
from lightning_nrml.data.noise_types import NoisyLabels
from lightning_nrml.data.splits import Split, Splits, check_splits, combined_keep
from lightning_nrml.data.tables import SUFFIXES, write_label_table
from lightning_nrml.files import write_text


def write_noisy_labels(data: NRMLDataModule, out: str | Path, force: bool = False) -> dict[str, Any]:
    """Put ``data.noise`` on the labels of the train split and write them, without opening an image.

    Single labels become a label table (``index``, ``path`` if images have names, ``label``, ``clean_label``,
    ``is_noise``, ``keep`` if samples are left out), which is a ``noise`` table and, with paths, a set of its
    own for ``TableDataModule``. Several labels per image become a table of image names and a 0/1 column for
    every label, for ``noise`` of the multi-label datamodules. Beside it, ``<out without suffix>.json`` holds
    the returned summary. Each file appears whole or not at all.

    Args:
        data: its ``noise`` must be set.
        out: ``.csv`` or ``.parquet`` file.
        force: overwrite files that are there.

    Returns:
        ``table``, ``kind``, ``rate``, ``seed``, ``num_train``, ``num_classes``, ``wrong`` (number of wrong
        labels or entries; of changed ones where ``truth_known`` is false: a noise table replaced labels of
        which nothing says that they are right), ``rate_realised`` (their share), ``hash`` of the given
        labels (the run card's), and ``classes``: for each class its ``name``, ``clean`` and ``given``
        number of images, and how many were ``removed`` from it and ``added`` to it.

    Raises:
        FileExistsError: a file is there, without ``force``.
        ValueError: no noise is set, the suffix is another, or what reading data or noise raises.
    """
    out = Path(out).expanduser()
    summary_file = out.with_suffix(".json")
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"'{out}': the suffix of a label table must be one of {', '.join(SUFFIXES)}")
    for file in (out, summary_file):
        if file.exists() and not force:
            raise FileExistsError(
                f"{file} exists: give another name, or --force (force=True) to overwrite it"
            )
    if data.noise.kind == "none" and data.noise.table is None:
        raise ValueError(f"{type(data).__name__} has no noise to write: set noise, such as kind and rate")
    splits = data.load_splits()
    check_splits(splits, type(data).__name__)
    noisy = data.noisy_labels(splits)
    summary = _summary(data, splits, noisy)
    if noisy.label.ndim == 2:
        assert splits.train.paths is not None
        write_multilabel_table(out, splits.train.paths, noisy.label, _names(splits), clean_known=noisy.known)
    else:
        write_label_table(out, _columns(splits.train, noisy))
    text = json.dumps({"table": out.name, **summary}, indent=1)
    write_text(summary_file, text + "\n")
    return {"table": str(out), **summary}


def _columns(train: Split, noisy: NoisyLabels) -> dict[str, Any]:
    columns: dict[str, Any] = noisy.to_columns()
    if train.paths is not None:
        columns["path"] = train.paths
    keep = combined_keep(train, noisy)
    if keep is not None:
        columns["keep"] = keep
    return columns


def _names(splits: Splits) -> list[str]:
    return splits.class_names or [str(c) for c in range(splits.num_classes)]


def _summary(data: NRMLDataModule, splits: Splits, noisy: NoisyLabels) -> dict[str, Any]:
    kind = "table" if data.noise.table is not None else data.noise.kind
    return {
        "kind": kind,
        "rate": None if kind == "table" else data.noise.rate,
        "seed": None if kind == "table" else data.noise.seed,
        "num_train": len(noisy.label),
        "num_classes": splits.num_classes if noisy.class_id is None else len(noisy.class_id),
        "wrong": int(noisy.is_noise.sum()),
        "truth_known": noisy.known,
        "rate_realised": round(float(noisy.is_noise.mean()), 6),
        "hash": label_hash(noisy.label),
        "classes": [
            {"name": name, "clean": clean, "given": given, "removed": removed, "added": added}
            for name, clean, given, removed, added in zip(
                _names(splits), *_counts(noisy, splits), strict=True
            )
        ],
    }


def _counts(noisy: NoisyLabels, splits: Splits) -> tuple[list[int], ...]:
    """Per class of the clean labels: clean, given, removed and added."""
    label, clean = noisy.label, noisy.clean_label
    if label.ndim == 2:
        parts = (clean, label, noisy.is_noise & (clean == 1), noisy.is_noise & (clean == 0))
        return tuple(part.sum(0).tolist() for part in parts)
    if noisy.class_id is not None:
        label = noisy.class_id[label]
    wrong = noisy.is_noise
    parts = (clean, label, clean[wrong], label[wrong])
    # a clean label of -1 is none of the classes
    return tuple(np.bincount(part[part >= 0], minlength=splits.num_classes).tolist() for part in parts)
