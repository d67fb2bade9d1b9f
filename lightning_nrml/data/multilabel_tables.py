"""Tables of images and label columns, lists of splits, and finding the images that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_nrml.data.splits import SPLIT_NAMES
from lightning_nrml.data.tables import booleans
from lightning_nrml.files import write_frame

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
        split: N names of splits, if the table has such a column.
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
        image_column: column of the images; default the first, and in a table of an audit ``path``.
        label_columns: columns of the labels; default all others but the one of the splits and remarks
            (``doubted``, ``marks``, ``clean_known``).
        split_column: column of the splits; not needed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suffix, a missing column, an image in two rows, or an entry that is neither 0
            nor 1; names file, row (from 0, without the header) and column. Also two columns of one name.
    """
    frame = _read(path)
    columns = [str(c) for c in frame.columns]
    frame.columns = columns  # type: ignore[assignment]
    audited = image_column not in columns and columns[0] == "path"
    image_column = columns[0] if image_column is None or audited else image_column
    names = [c for c in columns if c not in (image_column, split_column, *REMARKS)]
    names = names if label_columns is None else list(label_columns)
    for column in (image_column, *names):
        if column not in columns:
            raise ValueError(f"{path} has no column '{column}'; its columns are {', '.join(columns)}")
    if len(columns) == 1 and ";" in columns[0]:
        raise ValueError(f"{path} has one column, '{columns[0]}': is ';' its separator? Save it with commas")
    if not names or not len(frame):
        raise ValueError(
            f"{path} has {len(frame)} rows and {len(names)} label columns; give at least one of each"
        )
    images = [str(v) for v in frame[image_column]]
    _check_once(images, path)
    split = [str(v) for v in frame[split_column]] if split_column in columns else None
    label = _labels(frame, names, images, path)
    known = "clean_known" in columns and booleans(str(path), "clean_known", frame["clean_known"]).all()
    return MultiLabelTable(str(path), images, label, names, split, bool(known))


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet", ".txt", ".tsv"):
        raise ValueError(f"{path}: the suffix of a label table must be .csv, .parquet, .txt or .tsv")
    if not path.is_file():
        raise FileNotFoundError(f"no label table {path}; check path and table")
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        separator = "," if suffix == ".csv" else "\t"
        _check_header(path, separator)
        # the first column may hold names such as 007
        return pd.read_csv(path, sep=separator, dtype={0: str}, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a label table: {error}") from error


def _check_header(path: Path, separator: str) -> None:
    """Refuse two columns of one name, which pandas would call ``cars`` and ``cars.1``."""
    import pandas as pd

    head = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
    names = head.iloc[0].tolist()
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"there are {names.count(twice)} columns '{twice}'; rename or remove all but one")


def _check_once(images: Sequence[str], path: Path) -> None:
    seen: dict[str, int] = {}
    for row, image in enumerate(images):
        if image in seen:
            raise ValueError(
                f"{path}: image '{image}' stands in rows {seen[image]} and {row}; keep one row per image"
            )
        seen[image] = row


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
        value = frame[names[column]].tolist()[row]  # plain Python values, which read better than NumPy's
        shown = "an empty cell" if value is None or value != value else repr(value)
        raise ValueError(
            f"{path}, row {row} ({images[row]}), column '{names[column]}': {shown} "
            f"({int(bad.sum())} such); a label is 0 or 1"
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
    images = [str(v) for v in frame.iloc[:, 0]]
    _check_once(images, path)
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


def write_multilabel_table(
    path: Path,
    images: Sequence[str],
    label: np.ndarray,
    names: Sequence[str],
    image_column: str = "image",
    clean_known: bool = False,
) -> None:
    """Write what :func:`read_multilabel_table` reads, at once.

    Args:
        path: ``.csv`` or ``.parquet``; missing folders are made.
        images: N names of images, each once.
        label: ``(N, L)``, 0 or 1.
        names: L names of labels, each once.
        image_column: what to call the column of the images.
        clean_known: say in a column that the labels which the table replaces are the truth.

    Raises:
        ValueError: an image or a label twice, or a label with the name of the images' column; nothing is
            written then.
    """
    import pandas as pd

    _check_once(images, path)
    columns = [image_column, *names]
    twice = [name for name in names if columns.count(name) > 1]
    if twice:
        raise ValueError(f"{path} would have two columns '{twice[0]}'; rename the label")
    frame = pd.DataFrame(label.astype(np.uint8), columns=list(names))
    frame.insert(0, image_column, list(images))
    if clean_known:
        frame["clean_known"] = True
    write_frame(path, frame)


def read_scores(path: Path, images: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Scores of images and labels, ``(len(images), len(names))`` float64.

    Args:
        path: ``.npy`` of that shape and order, or a table with a row per image, its name in the first column
            and a column of numbers for every label; in any order, further rows and columns are not used.
        images: names of the images.
        names: names of the labels.

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
    frame = _read(path)
    frame.columns = [str(c) for c in frame.columns]  # type: ignore[assignment]
    lost = [name for name in names if name not in frame.columns]
    if lost:
        raise ValueError(f"{path} has no column '{lost[0]}'; it needs one for each label")
    there = [str(v) for v in frame.iloc[:, 0]]
    _check_once(there, path)
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
        ValueError: no train split, an unknown split or image, or an image that is listed twice.
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
        for line, image in enumerate(file.read_text(encoding="utf-8").split("\n")):
            image = image.strip()
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
        rows[split] = np.asarray(found, dtype=np.int64)
    return rows


def _rows_of_column(table: MultiLabelTable) -> dict[str, np.ndarray]:
    if table.split is None:
        raise ValueError(
            f"{table.source} has no column of splits; add one (train, val, test), or give lists in splits"
        )
    split = np.asarray(table.split)
    _check_split_names(dict.fromkeys(split.tolist()), table.source)
    return {name: np.flatnonzero(split == name) for name in SPLIT_NAMES if (split == name).any()}


def _check_split_names(names: Mapping[str, object], source: str) -> None:
    unknown = [n for n in names if n not in SPLIT_NAMES]
    if unknown:
        raise ValueError(f"{source}: '{unknown[0]}' is no split; accepted are {', '.join(SPLIT_NAMES)}")
    if "train" not in names:
        raise ValueError(f"{source}: there is no train split")


def find_images(images: Sequence[str], root: Path) -> list[Path]:
    """The files behind the names of a table.

    Names with a suffix are paths below ``root``; others are looked for in all folders below it. Names that
    have no file are given as paths below ``root``, for the datamodule to refuse or skip.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two files have the name of one image.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} of images; check path and images")
    if all(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in images):
        return [root / name for name in images]
    wanted, found = set(images), dict[str, Path]()
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() not in IMAGE_SUFFIXES or file.stem not in wanted:
            continue
        if file.stem in found:
            raise ValueError(
                f"image '{file.stem}' is both {found[file.stem]} and {file}; remove one, or write paths with "
                "suffix into the table"
            )
        found[file.stem] = file
    return [found.get(name, root / name) for name in images]
