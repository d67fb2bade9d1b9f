"""Images listed in a CSV or Parquet file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.decode import Fit
from lightning_nrml.data.noise import NoisyLabels, renumbering
from lightning_nrml.data.sources import FileSource
from lightning_nrml.data.splits import SPLIT_NAMES, Splits, split_by_rows
from lightning_nrml.data.tables import booleans, check_filled, check_header, read_csv, read_parquet

if TYPE_CHECKING:
    import pandas as pd


class TableDataModule(NRMLDataModule):
    """A table with the columns ``path``, ``label`` and, if you have them, ``clean_label`` and ``split``.

    Labels are class names or integers; classes are numbered in sorted order. ``split`` holds "train",
    "val" or "test"; without it all rows train and there is nothing to evaluate on, which is enough to
    audit labels. An image belongs to one split. With ``clean_label``, train uses ``label`` and evaluation
    the clean ones; a split whose clean labels are unknown (empty, or -1 where that is no class) uses
    ``label`` and cannot be measured against the truth.

    Args:
        path: ``.csv`` or ``.parquet`` file.
        root: folder that image paths are relative to; ``None`` = the folder of the table.
        path_column: name of the column of paths.
        label_column: name of the column of labels to train on.
        clean_label_column: name of the column of true labels; used if it is there.
        split_column: name of the column of splits; used if it is there.
        is_noise_column: name of the column of labels known to be wrong; used if it and the clean labels are
            there. Where it is true, a clean label of -1 means none of the classes.
        keep_column: name of the column that leaves samples out of training where it is false; used if it is
            there.
        image_size: side of the square that images are brought to.
        channels: 3 (RGB) or 1 (grey).
        fit: ``"crop"`` cuts the centre square, ``"squash"`` ignores the aspect ratio.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        path_column: str = "path",
        label_column: str = "label",
        clean_label_column: str = "clean_label",
        split_column: str = "split",
        is_noise_column: str = "is_noise",
        keep_column: str = "keep",
        image_size: int = 224,
        channels: int = 3,
        fit: Fit = "crop",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.root = path, root
        self.path_column, self.label_column = path_column, label_column
        self.clean_label_column, self.split_column = clean_label_column, split_column
        self.is_noise_column, self.keep_column = is_noise_column, keep_column
        self.image_size, self.channels, self.fit = image_size, channels, fit

    def load_splits(self) -> Splits:
        table = Path(self.path).expanduser()
        frame = read_table(table, self.path_column, (self.label_column, self.clean_label_column))
        for column in (self.path_column, self.label_column):
            if column not in frame.columns:
                there = ", ".join(map(str, frame.columns))
                raise KeyError(f"{table} has no column '{column}'; its columns are {there}")
            check_filled(frame, column, table)
        names, label, clean = number_classes(frame[self.label_column], frame.get(self.clean_label_column))
        rows = self._rows(frame, table)
        if clean is not None:
            wrong = np.zeros(len(frame), dtype=bool)
            if self.is_noise_column in frame.columns:
                wrong = booleans(str(table), self.is_noise_column, frame[self.is_noise_column])
                names, clean = one_numbering(names, label, clean, wrong, str(table))
            self._check_known((clean >= 0) | wrong, rows, table)
        root = table.parent if self.root is None else Path(self.root).expanduser()
        paths = frame[self.path_column].astype(str).tolist()
        files = [root / p for p in paths]
        check_once(files, rows, label, table)
        images = FileSource(files, self.channels, self.image_size, self.fit)
        keep = None
        if self.keep_column in frame.columns:
            keep = booleans(str(table), self.keep_column, frame[self.keep_column])
            self._check_keep(keep[rows["train"]], table)
        return split_by_rows(images, label, rows, names, str(table), clean, paths, keep)

    def _rows(self, frame: pd.DataFrame, table: Path) -> dict[str, np.ndarray]:
        if self.split_column not in frame.columns:
            return {"train": np.arange(len(frame))}
        check_filled(frame, self.split_column, table)
        split = frame[self.split_column].astype(str).to_numpy()
        known = np.isin(split, SPLIT_NAMES)
        if not known.all():
            row = int(np.argmin(known))
            raise ValueError(
                f"{table}, column '{self.split_column}', row {row}: {split[row]!r}; "
                f"a split is one of {', '.join(SPLIT_NAMES)}"
            )
        rows = {name: np.flatnonzero(split == name) for name in SPLIT_NAMES}
        return {name: at for name, at in rows.items() if name == "train" or len(at)}

    def _check_keep(self, keep: np.ndarray, table: Path) -> None:
        if len(keep) and not keep.any():
            raise ValueError(
                f"{table}, column '{self.keep_column}': false in all {len(keep)} train rows, so none is left "
                "to train on; set it to true where a row shall train, or remove the column"
            )

    def _check_known(self, known: np.ndarray, rows: dict[str, np.ndarray], table: Path) -> None:
        """Refuse a split of which some clean labels are known: the others are neither right nor wrong."""
        for name, at in rows.items():
            unknown = at[~known[at]]
            if 0 < len(unknown) < len(at):
                raise ValueError(
                    f"{table}, column '{self.clean_label_column}', row {unknown[0]}: unknown (empty or "
                    f"-1), as are {len(unknown)} of {len(at)} {name} rows; give all of that split or none, "
                    "or set clean_label_column to a name that the table lacks"
                )


def check_once(files: Sequence[Path], rows: Mapping[str, np.ndarray], label: np.ndarray, table: Path) -> None:
    """Refuse an image in two splits; warn of one in several rows of a split.

    Twice in a split costs nothing that the user may not want: it weighs more, or has two labels, which is
    noise. Spelled differently it is still the same file; links are not followed.
    """
    first: dict[str, tuple[str, int]] = {}
    again = []
    for split, at in rows.items():
        for row in at.tolist():
            other, before = first.setdefault(os.path.normpath(files[row]), (split, row))
            if other != split:
                raise ValueError(
                    f"{table}: the image of row {row} ({split}) is that of row {before} ({other}), "
                    f"{files[before]}; an image belongs to one split, remove one of the rows"
                )
            if before != row:
                again.append((before, row))
    if again:
        differ = sum(int(label[before] != label[row]) for before, row in again)
        before, row = again[0]
        warnings.warn(
            f"{table}: {len(again)} rows have the image of an earlier row, {differ} of them with another "
            f"label; the first is row {row}, whose image is that of row {before}, {files[before]}",
            stacklevel=2,
        )


def read_table(path: Path, path_column: str, label_columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read a ``.csv`` or ``.parquet`` file; ``path_column`` as text, and labels such as 01.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a file that cannot be parsed, or one of these columns twice.
    """

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; TableDataModule reads a table of image paths and labels")
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"{path}: the suffix must be .csv or .parquet")
    try:
        if path.suffix.lower() == ".parquet":
            return read_parquet(path)
        texts = [path_column, *label_columns]
        check_header(path, ",", texts)
        frame = read_csv(path, texts)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    labels = [column for column in label_columns if column in frame.columns]
    if not any(frame[column].str.match(r"\s*[+-]?0\d", na=False).any() for column in labels):
        for column in labels:
            frame[column] = _whole_numbers_if_all(frame[column])
    return frame


#: what is a number and no name: 1.1 and 1.10, 1000 and 1e3 may be two classes
_WHOLE = r"\s*\+?(0|-?[1-9][0-9]{0,17})(?:\.0*)?\s*"


def _whole_numbers_if_all(column: pd.Series) -> pd.Series:
    """Text as whole numbers if every cell is one, also as ``7.0``; else as it stands."""
    number = column.str.extract(f"^{_WHOLE}$", expand=False)
    return number.astype("Int64") if (number.notna() | column.isna()).all() else column


def number_classes(
    label: pd.Series, clean: pd.Series | None = None
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Number the classes of the given and the clean labels alike.

    Args:
        label: whole numbers or names.
        clean: the same; an empty cell is unknown, and so is -1 unless it is a class of ``label``.

    Returns:
        Names of all classes in sorted order, class ids, and clean class ids with -1 = unknown.
    """
    columns = [label] if clean is None else [label, clean]
    values = [_numbers_or_text(column) for column in columns]
    if not all(v.dtype.kind == "i" for v in values):
        values = [v.astype(np.str_) for v in values]
    known = [column.notna().to_numpy() for column in columns]
    minus_one = values[0].dtype.type(-1)
    if minus_one not in values[0]:
        known[-1] = known[-1] & (values[-1] != minus_one)
    classes = np.unique(np.concatenate([v[k] for v, k in zip(values, known, strict=True)]))
    ids = [np.where(k, np.searchsorted(classes, v), -1) for v, k in zip(values, known, strict=True)]
    return [str(c) for c in classes], ids[0], None if clean is None else ids[1]


def one_numbering(
    names: list[str], label: np.ndarray, clean: np.ndarray, wrong: np.ndarray, source: str
) -> tuple[list[str], np.ndarray]:
    """Class names and clean labels in the numbering of the given ones, where noise renumbered these.

    Noise that dissolves classes (``small_cluster``) does so; the right rows pair old and new numbers. Clean
    labels of dissolved classes become -1.
    """
    class_id = renumbering(label, clean, wrong | (clean < 0), source)
    if class_id is None:
        return names, clean
    return [names[c] for c in class_id], NoisyLabels(label, clean, wrong, class_id).true_label


def _numbers_or_text(column: pd.Series) -> np.ndarray:
    """Int64 for whole numbers, also as floats, which pandas makes of them beside empty cells; else text.

    Empty cells become -1.
    """
    import pandas as pd

    cells = column.astype(object).where(column.notna(), -1).convert_dtypes()
    if pd.api.types.is_integer_dtype(cells):
        return cells.to_numpy(dtype=np.int64)
    # blanks around a name, and how its accents are encoded, tell no classes apart
    return np.asarray([normalize("NFC", str(cell).strip()) for cell in cells])
