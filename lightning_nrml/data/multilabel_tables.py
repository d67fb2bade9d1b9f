"""Tables of images and label columns, lists of splits, and finding the images that they name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_nrml.data.splits import SPLIT_NAMES
from lightning_nrml.data.tables import (
    booleans,
    check_filled,
    check_header,
    read_csv,
    read_parquet,
    shown,
)
from lightning_nrml.files import read_lines

if TYPE_CHECKING:
    import pandas as pd

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
#: columns beside the labels, which an audit or ``nrml inject`` writes
REMARKS = ("doubted", "marks", "clean_known")


@dataclass(frozen=True, slots=True)
class MultiLabelTable:
    """Labels of a whole set.

    Args:
        source: the file, for messages.
        images: N names of images as written, each once.
        label: ``(N, L)`` int64, 0 or 1.
        names: L names of labels.
        split: N names of splits ("" = none), if the table has such a column.
        clean_known: the labels that this table replaces are the truth (column ``clean_known``).
    """

    source: str
    images: list[str]
    label: np.ndarray
    names: list[str]
    split: list[str] | None = None
    clean_known: bool = False


def read_multilabel_table(
    path: Path,
    image_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    split_column: str = "split",
) -> MultiLabelTable:
    """Read a table with a row for every image and a 0/1 column for every label.

    Args:
        path: ``.csv``, ``.parquet``, or tab separated ``.txt`` / ``.tsv`` (UC Merced's).
        image_column: column of the images; default the first. Tables that an audit or ``nrml inject`` wrote
            may have ``path`` or ``image`` in its place.
        label_columns: columns of the labels; default all others but the one of the splits and remarks
            (``doubted``, ``marks``, ``clean_known``).
        split_column: column of the splits; not needed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suffix, a missing column, an image in two rows, or an entry that is neither 0
            nor 1; names file, row (from 0, without the header) and column. Also two columns of one name, and
            a label that is called like a remark.
    """
    frame = _read(path, image_column)
    columns = [str(c) for c in frame.columns]
    written = image_column not in columns and columns[0].rstrip("_") in ("path", "image")
    image_column = columns[0] if image_column is None or written else image_column
    names = [c for c in columns if c not in (image_column, split_column, *REMARKS)]
    names = names if label_columns is None else list(label_columns)
    for column in (image_column, *names):
        if column not in columns:
            raise ValueError(f"{path} has no column '{column}'; its columns are {', '.join(columns)}")
        if names.count(column) > 1:
            raise ValueError(f"label_columns names '{column}' {names.count(column)} times; once will do")
    if len(columns) == 1 and ";" in columns[0]:
        raise ValueError(f"{path} has one column, '{columns[0]}': is ';' its separator? Save it with commas")
    if not names or not len(frame):
        raise ValueError(
            f"{path} has {len(frame)} rows and {len(names)} label columns; give at least one of each"
        )
    _check_remarks(frame, names if label_columns else [], path)
    images = _images(frame, image_column, path)
    split = _words(frame[split_column]) if split_column in columns else None
    label = _labels(frame, names, images, path)
    known = "clean_known" in columns and booleans(str(path), "clean_known", frame["clean_known"]).all()
    return MultiLabelTable(str(path), images, label, names, split, bool(known))


def _read(path: Path, image_column: str | None = None) -> pd.DataFrame:
    """The table with names of columns as text, and the first and ``image_column`` as text in a CSV."""

    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet", ".txt", ".tsv"):
        raise ValueError(f"{path}: the suffix of a label table must be .csv, .parquet, .txt or .tsv")
    if not path.is_file():
        raise FileNotFoundError(f"no label table {path}; check path and table")
    try:
        if suffix == ".parquet":
            return read_parquet(path).rename(columns=str)
        separator = "," if suffix == ".csv" else "\t"
        check_header(path, separator)
        return read_csv(path, [0, image_column or 0], separator)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a label table: {error}") from error


def _check_remarks(frame: pd.DataFrame, labels: Sequence[str], path: Path) -> None:
    """Refuse remarks as ``labels`` (empty = all columns): an audit would write over them."""
    taken = [name for name in REMARKS if name in labels]
    if not labels:
        words = [name for name in ("doubted", "marks") if name in frame.columns]
        taken = [name for name in words if np.isin(_numbers(frame, [name]), (0, 1)).all()]
    if taken:
        raise ValueError(f"{path}: '{taken[0]}' is a column of remarks, not of a label; rename the label")


def _words(column: pd.Series) -> list[str]:
    return ["" if empty else str(word) for word, empty in zip(column, column.isna(), strict=True)]


def _images(frame: pd.DataFrame, column: str, path: Path) -> list[str]:
    """Names of images without blanks around them, each once."""
    check_filled(frame, column, path)
    images = [str(name).strip() for name in frame[column]]
    check_once(images, path)
    return images


def check_once(images: Sequence[str], path: Path) -> None:
    """Refuse an image in two rows, also where it is spelled differently (``./0.png``)."""
    row = _first_repeated([os.path.normpath(image) for image in images])
    if row is not None:
        before, again = row
        spelled = "" if images[before] == images[again] else f", there as '{images[before]}'"
        raise ValueError(
            f"{path}: image '{images[again]}' stands in rows {before} and {again}{spelled}; keep one row per "
            "image"
        )


def _first_repeated(values: Sequence[str]) -> tuple[int, int] | None:
    """Positions of the first value that has occurred before."""
    seen: dict[str, int] = {}
    return next(((seen[v], i) for i, v in enumerate(values) if seen.setdefault(v, i) != i), None)


def _numbers(frame: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Columns as ``(N, len(names))`` float64, NaN where there is no number."""
    import pandas as pd

    columns = [pd.to_numeric(frame[n], errors="coerce").to_numpy(np.float64, na_value=np.nan) for n in names]
    return np.stack(columns, axis=1)


def _labels(frame: pd.DataFrame, names: Sequence[str], images: Sequence[str], path: Path) -> np.ndarray:
    number = _numbers(frame, names)
    bad = (number != 0) & (number != 1)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{path}, row {row} ({images[row]}), column '{names[column]}': "
            f"{shown(frame[names[column]], row)} ({int(bad.sum())} such); a label is 0 or 1"
        )
    return number.astype(np.int64)


def read_label_lists(path: Path, names: Sequence[str], spellings: Mapping[str, int]) -> MultiLabelTable:
    """Read a Parquet table whose first column names images and whose second holds lists of label names.

    Args:
        path: the file.
        names: L names of labels.
        spellings: label name in lower case -> its position in ``names``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, has other columns, an image twice, or a label that is not known.
    """
    frame = _read(path)
    if frame.shape[1] < 2 or not len(frame):
        raise ValueError(f"{path} needs rows, a column of image names and one with lists of label names")
    images = _images(frame, frame.columns[0], path)
    label = np.zeros((len(images), len(names)), dtype=np.int64)
    for row, given in enumerate(frame.iloc[:, 1]):
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            raise ValueError(f"{path}, row {row} ({images[row]}): {given!r} is no list of label names")
        for name in given:
            if str(name).lower() not in spellings:
                raise ValueError(
                    f"{path}, row {row} ({images[row]}): label '{name}' is not among {', '.join(names)}"
                )
            label[row, spellings[str(name).lower()]] = 1
    return MultiLabelTable(str(path), images, label, list(names))


def read_scores(
    path: Path, images: Sequence[str], names: Sequence[str], image_column: str | None = None
) -> np.ndarray:
    """Scores of images and labels, ``(len(images), len(names))`` float64.

    Args:
        path: ``.npy`` of that shape and order, or a table with a row per image, its name in ``image_column``
            and a column of numbers for every label; in any order, further rows and columns are not used.
        images: names of the images.
        names: names of the labels.
        image_column: default, and where the table has no such column, the first.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, has another shape, or lacks an image or a label.
    """
    if path.suffix.lower() == ".npy":
        if not path.is_file():
            raise FileNotFoundError(f"no file {path} of scores; check noise.scores")
        try:
            scores = np.load(path, allow_pickle=False)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an array of scores: {error}") from error
        if scores.shape != (len(images), len(names)):
            raise ValueError(
                f"{path} has shape {scores.shape}, but there are {len(images)} train images and {len(names)} "
                "labels"
            )
        return np.asarray(scores, dtype=np.float64)
    frame = _read(path, image_column)
    lost = [name for name in names if name not in frame.columns]
    if lost:
        raise ValueError(f"{path} has no column '{lost[0]}'; it needs one for each label")
    if image_column is None or image_column not in frame.columns:
        image_column = str(frame.columns[0])
    there = _images(frame, image_column, path)
    position = {image: row for row, image in enumerate(there)}
    absent = [image for image in images if image not in position]
    if absent:
        raise ValueError(
            f"{path} has no row for {len(absent)} of {len(images)} train images, the first is '{absent[0]}'"
        )
    numbers = _numbers(frame, names)
    return numbers[[position[image] for image in images]]


def split_rows(table: MultiLabelTable, files: Mapping[str, Path] | None) -> dict[str, np.ndarray]:
    """Rows of the table by split, from lists of images or from the table's own column.

    Args:
        table: the labels.
        files: for each split a text file with one image per line, as the table names them; ``None`` takes the
            column.

    Raises:
        FileNotFoundError: a list does not exist.
        ValueError: no train split, an unknown split or image, an empty list, or an image that is listed
            twice.
    """
    if files is None:
        return _rows_of_column(table)
    _check_split_names(files, table.source)
    position = {image: row for row, image in enumerate(table.images)}
    owner: dict[str, str] = {}
    rows: dict[str, np.ndarray] = {}
    for split, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"no list {file} for the {split} split")
        found = []
        for line, image in enumerate(read_lines(file)):
            if not image:
                continue
            if image not in position:
                raise ValueError(f"{file}, line {line + 1}: '{image}' has no row in {table.source}")
            if image in owner:
                raise ValueError(
                    f"{file}, line {line + 1}: '{image}' is in the {owner[image]} split already; an image "
                    "belongs to one split, once"
                )
            owner[image] = split
            found.append(position[image])
        if not found:
            raise ValueError(f"{file} names no image: the {split} split is empty")
        rows[split] = np.asarray(found, dtype=np.int64)
    return rows


def _rows_of_column(table: MultiLabelTable) -> dict[str, np.ndarray]:
    if table.split is None:
        raise ValueError(
            f"{table.source} has no column of splits; add one (train, val, test), or give lists in splits"
        )
    for row, name in enumerate(table.split):
        if name not in SPLIT_NAMES:
            given = repr(name) if name else "an empty cell"
            raise ValueError(
                f"{table.source}, row {row} ({table.images[row]}): {given} is no split; accepted are "
                f"{', '.join(SPLIT_NAMES)}"
            )
    split = np.asarray(table.split)
    _check_split_names(dict.fromkeys(table.split), table.source)
    return {name: np.flatnonzero(split == name) for name in SPLIT_NAMES if (split == name).any()}


def _check_split_names(names: Mapping[str, object], source: str) -> None:
    unknown = [n for n in names if n not in SPLIT_NAMES]
    if unknown:
        raise ValueError(f"{source}: '{unknown[0]}' is no split; accepted are {', '.join(SPLIT_NAMES)}")
    if "train" not in names:
        raise ValueError(f"{source}: there is no train split")


def find_images(images: Sequence[str], root: Path, once: bool = True) -> list[Path]:
    """The files behind the names of a table.

    Names with a suffix are paths below ``root``; others lack only the suffix if they name a folder, and are
    looked for in all folders below ``root`` if not. Names that have no file are given as paths below
    ``root``, for the datamodule to refuse or skip.

    Args:
        images: names.
        root: folder of the images.
        once: refuse two names of one file (links are not followed).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two files have the name of one image, or two images one file.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} of images; check path and images")
    files = [root / name for name in images]
    if not all(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        files = _searched(images, files, root)
    twice = _first_repeated([os.path.normpath(file) for file in files]) if once else None
    if twice is not None:
        one, other = twice
        raise ValueError(
            f"images '{images[one]}' and '{images[other]}' (rows {one} and {other}) are one file, "
            f"{files[one]}; keep one row per image"
        )
    return files


def _searched(images: Sequence[str], files: Sequence[Path], root: Path) -> list[Path]:
    """``files`` with the suffix and the folder that the names of ``images`` lack."""
    keys = [
        os.path.normpath(file) if os.path.dirname(name) else name
        for name, file in zip(images, files, strict=True)
    ]
    wanted, found = dict(zip(keys, images, strict=True)), dict[str, Path]()
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        for key in {file.stem, os.path.normpath(file.with_suffix(""))} & wanted.keys():
            if key in found:
                raise ValueError(
                    f"image '{wanted[key]}' is both {found[key]} and {file}; remove one, or write paths with "
                    "suffix into the table"
                )
            found[key] = file
    return [found.get(key, file) for key, file in zip(keys, files, strict=True)]
