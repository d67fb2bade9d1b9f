"""Label tables: one row per sample, as CSV or Parquet by the file's suffix.

Columns (others are kept and not looked at):

| column | holds |
|---|---|
| ``index`` | position in the training set, from 0; unique |
| ``path`` | path of the image as the dataset names it; instead of ``index`` (then unique) or beside it |
| ``label`` | given class id, from 0; -1 = unlabelled |
| ``clean_label`` | true class id, for measurement only; -1 = unknown |
| ``weight`` | in [0, 1] |
| ``keep``, ``is_noise`` | true/false or 1/0 |
| ``clean_known`` | true/false or 1/0: the labels that the table replaces are the truth |

The same format carries noisy labels, partially labelled data, pseudo-labels and selections.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_nrml.files import write_frame

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")
_INTEGER_MIN = {"index": 0, "label": -1, "clean_label": -1}
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _checked_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"label table '{path}': the suffix must be one of {', '.join(SUFFIXES)}")
    return suffix


def _fail(source: str, column: str, bad: np.ndarray, values: pd.Series, need: str) -> None:
    """Raise for the first row where ``bad``; rows count from 0 without the header."""
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"label table '{source}', column '{column}', row {row}: {shown(values, row)}; {need}"
        )


def shown(values: pd.Series, row: int) -> str:
    """A cell in a message."""
    value = values.tolist()[row]  # plain Python values, which read better than NumPy's
    return "an empty cell" if values.isna().iloc[row] else repr(value)


def check_filled(frame: pd.DataFrame, column: str, source: str | Path) -> None:
    """Refuse missing and blank values, naming the first row (from 0, without the header)."""
    missing = (frame[column].isna() | (frame[column].astype(str).str.strip() == "")).to_numpy()
    if missing.any():
        raise ValueError(
            f"{source}, column '{column}', row {int(np.argmax(missing))}: empty ({int(missing.sum())} such); "
            "fill it or remove the row"
        )


def check_header(path: Path, separator: str, columns: Sequence[str] | None = None) -> None:
    """Refuse two columns of one name (of ``columns``), which pandas would call ``cars`` and ``cars.1``."""
    import pandas as pd

    head = pd.read_csv(
        path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False, skipinitialspace=True
    )
    names = head.iloc[0].tolist()
    seen = [name for name in names if name and (columns is None or name in columns)]
    twice = next((name for name in seen if seen.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"there are {names.count(twice)} columns '{twice}'; rename or remove all but one")


def read_csv(path: Path, texts: Iterable[str | int], separator: str = ",") -> pd.DataFrame:
    """As pandas reads it, but only empty cells are missing (an image or a class may be called "NA").

    Where the header has blanks after its separators (``path, label``), those of all rows do not count.

    Args:
        path: the file.
        texts: columns to read as text, for there may be names such as 007.
        separator: of the cells.
    """
    import pandas as pd

    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    return pd.read_csv(
        path,
        sep=separator,
        dtype=dict.fromkeys(texts, str),
        keep_default_na=False,
        na_values=[""],
        skipinitialspace=any(name.startswith(" ") for name in header),
    )


def read_parquet(path: Path) -> pd.DataFrame:
    """As pandas reads it, with names that some programs write as bytes in text."""
    import pandas as pd

    frame = pd.read_parquet(path)
    for name in frame.columns[[pd.api.types.is_object_dtype(kind) for kind in frame.dtypes]]:
        if pd.api.types.infer_dtype(frame[name]) == "bytes":
            frame[name] = frame[name].str.decode("utf-8")
    return frame


def _integers(source: str, column: str, values: pd.Series, minimum: int) -> np.ndarray:
    import pandas as pd

    need = f"whole numbers of at least {minimum} are accepted"
    if column == "label":
        need += " (-1 = unlabelled)"
    number = pd.to_numeric(values, errors="coerce")
    as_float = number.to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(as_float) | (as_float != np.floor(as_float)) | (as_float < minimum)
    _fail(source, column, bad, values, need)
    return number.to_numpy().astype(np.int64)


def _weights(source: str, column: str, values: pd.Series) -> np.ndarray:
    import pandas as pd

    weight = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    _fail(source, column, ~((weight >= 0) & (weight <= 1)), values, "numbers in [0, 1] are accepted")
    return weight


def booleans(source: str, column: str, values: pd.Series) -> np.ndarray:
    """A column of true/false or 1/0 as bool; refuses anything else, naming the row."""
    known = values.astype(str).str.lower().map(_TRUTH)
    _fail(source, column, known.isna().to_numpy(), values, "true/false or 1/0 are accepted")
    return known.to_numpy().astype(bool)


def _check_unique(source: str, column: str, values: pd.Series) -> None:
    twice = values.duplicated().to_numpy()
    _fail(source, column, twice, values, "it occurs in an earlier row already; keep one row per sample")


def _validated(frame: pd.DataFrame, source: str, column: str) -> pd.DataFrame:
    """A copy with checked columns of the right dtypes (int64, float64, bool, str)."""
    names = ", ".join(map(str, frame.columns)) or "none"
    if column not in frame.columns:
        raise ValueError(f"label table '{source}' has no column '{column}'; its columns are: {names}")
    if "index" not in frame.columns and "path" not in frame.columns:
        raise ValueError(f"label table '{source}' needs a column 'index' or 'path'; its columns are: {names}")
    if not len(frame):
        raise ValueError(f"label table '{source}' has no rows; give one row per sample")
    frame = frame.reset_index(drop=True).copy()
    for name in dict.fromkeys(["index", column, "label", "clean_label"]):
        if name in frame.columns:
            minimum = _INTEGER_MIN.get(name, -1)
            frame[name] = _integers(source, name, frame[name], minimum)
    if "weight" in frame.columns:
        frame["weight"] = _weights(source, "weight", frame["weight"])
    for name in ("keep", "is_noise", "clean_known"):
        if name in frame.columns:
            frame[name] = booleans(source, name, frame[name])
    if "index" in frame.columns:
        _check_unique(source, "index", frame["index"])
    if "path" in frame.columns:
        empty = frame["path"].isna().to_numpy()
        _fail(source, "path", empty, frame["path"], "every row needs a path (or drop the column)")
        frame["path"] = frame["path"].astype(str)
        if "index" not in frame.columns:  # which tells samples of one image apart
            _check_unique(source, "path", frame["path"])
    return frame


def read_label_table(path: str | os.PathLike[str], column: str = "label") -> pd.DataFrame:
    """Read and check a label table.

    Args:
        path: ``.csv`` or ``.parquet`` file.
        column: the column that holds the labels, if not ``label`` (a table may hold several).

    Returns:
        The table in file order: int64 ``index``, ``label``/``column``, ``clean_label``; float64 ``weight``;
        bool ``keep``, ``is_noise``, ``clean_known``; str ``path``; further columns as pandas reads them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown suffix, unreadable file, missing column, no rows, or a bad value; the message
            names file, column and row (from 0, without the header).
    """
    path = Path(path).expanduser()
    suffix = _checked_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"label table '{path}' does not exist (working directory: {Path.cwd()})")
    try:
        frame = read_csv(path, ["path"]) if suffix == ".csv" else read_parquet(path)
    except (ValueError, OSError) as error:  # parser errors of pandas and pyarrow are ValueErrors
        raise ValueError(f"label table '{path}' is not readable as {suffix[1:]}: {error}") from error
    return _validated(frame, str(path), column)


def match_rows(
    frame: pd.DataFrame,
    source: str,
    num_samples: int,
    path: Sequence[str] | None = None,
    absent: Sequence[int] = (),
) -> np.ndarray:
    """Row of the table for every sample of a dataset, by ``path`` if both have it, else by ``index``.

    Positions move when a file is added, renamed or missing, so paths count where both are there, unless two
    samples share one: then they are told apart by ``index``.

    Args:
        frame: a table from :func:`read_label_table`.
        source: its file name, for messages.
        num_samples: N, size of the training set.
        path: N paths as the dataset names them.
        absent: samples that need no row.

    Returns:
        ``(N,)`` int64, so that ``frame.iloc[rows]`` is in the dataset's order; -1 for absent samples without
        a row.

    Raises:
        ValueError: rows are missing or belong to no sample, or the table has paths only and the dataset none,
            or one of two samples.
    """
    both = "index" in frame.columns and "path" in frame.columns and path is not None
    by_path = both and frame["path"].is_unique and len(set(path or ())) == num_samples
    if "index" in frame.columns and not by_path:
        index = frame["index"].to_numpy()
        unknown = index >= num_samples
        need = f"the training set has {num_samples} samples, so the table belongs to another split"
        _fail(source, "index", unknown, frame["index"], need)
    elif path is None:
        raise ValueError(
            f"label table '{source}' names samples by path, but this dataset has no paths; "
            "give a column 'index' instead"
        )
    else:
        index = _positions(frame, source, path)
        need = f"no such path in the training set, whose first is '{path[0] if len(path) else ''}'"
        need += "; correct it, or remove the column if the positions in 'index' hold" if both else ""
        _fail(source, "path", index < 0, frame["path"], need)
    rows = np.full(num_samples, -1, dtype=np.int64)
    rows[index] = np.arange(len(index))
    missing = np.setdiff1d(np.flatnonzero(rows < 0), np.asarray(absent, dtype=np.int64))
    if len(missing):
        raise ValueError(
            f"label table '{source}' has no row for {len(missing)} of {num_samples} training samples, "
            f"the first is index {missing[0]}; give one row per sample"
        )
    return rows


def _positions(frame: pd.DataFrame, source: str, path: Sequence[str]) -> np.ndarray:
    """Sample of every row of the table, by path; -1 = none."""
    position: dict[str, int] = {}
    for i, name in enumerate(path):
        if position.setdefault(str(name), i) != i:
            raise ValueError(
                f"label table '{source}' names samples by path, but '{name}' is the path of the samples "
                f"{position[str(name)]} and {i}; give a column 'index' instead"
            )
    return np.asarray([position.get(name, -1) for name in frame["path"]], dtype=np.int64)


def write_label_table(
    path: str | os.PathLike[str], frame: pd.DataFrame | Mapping[str, Any], column: str = "label"
) -> Path:
    """Check a label table and write it at once: readers see the old file or the new one, never a part.

    Args:
        path: ``.csv`` or ``.parquet`` file; missing folders are made.
        frame: the table, or a mapping from column name to equally long arrays or tensors.
        column: the column that holds the labels, if not ``label``.

    Returns:
        The path written.

    Raises:
        ValueError: as :func:`read_label_table`; nothing is written then.
    """
    import pandas as pd

    path = Path(path).expanduser()
    _checked_suffix(path)
    if not isinstance(frame, pd.DataFrame):
        frame = pd.DataFrame({name: np.asarray(values) for name, values in frame.items()})
    write_frame(path, _validated(frame, str(path), column))
    return path
