"""The ledger of a run's noise filter as an audit table: what it thought of samples, or of single labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_nrml.audit.data import AuditData
from lightning_nrml.audit.labels import entry_columns, label_entries
from lightning_nrml.audit.table import audit_table
from lightning_nrml.data.tables import read_label_table

if TYPE_CHECKING:
    import pandas as pd

_NEEDED = ("mean_log_p_clean", "times_seen", "times_dropped", "keep")
_OF_LABELS = ("index", "label", "label_name", "given", "rank", *_NEEDED)


def find_label_ledger(path: str | os.PathLike[str]) -> Path | None:
    """The parquet with every label, if ``path`` is a ledger of a multi-label run.

    Beside ``noise_ledger.csv`` or ``.parquet`` such a run has ``noise_ledger_labels.parquet``. ``None`` for
    the ledger of a run with one class per sample.
    """
    path = Path(path)
    stem = path.stem.removesuffix("_labels")
    found = path.with_name(f"{stem}_labels.parquet")
    return found if found.is_file() else path if path.stem.endswith("_labels") else None


def from_ledger(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The audit table of a run's ``noise_ledger.parquet`` or ``.csv``: the filter's own mean scores.

    Ranked as the ledger is: by the share of batches that dropped the sample, then by the mean score.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ledger; names the missing column.
    """
    try:
        frame = read_label_table(path)
    except ValueError as error:
        if "column 'label'" not in str(error):
            raise
        raise ValueError(f"{error}; of a multi-label run give noise_ledger_labels.parquet") from error
    for column in ("mean_log_p_clean", "suggested_label", *_NEEDED):
        if column not in frame.columns:
            raise ValueError(
                f"ledger '{path}' has no column '{column}'; give the noise_ledger.parquet or .csv of a run"
            )
    by_rank = frame.sort_values("rank", kind="stable").reset_index(drop=True)
    by_rank["log_p_clean"] = by_rank["mean_log_p_clean"].astype(np.float32)
    return by_rank.drop(columns="mean_log_p_clean")


def ledger_names(frame: pd.DataFrame) -> list[str] | None:
    """Class names by id, from the names in a ledger's table; an id that does not occur in it is its own."""
    if "label_name" not in frame.columns or "suggested_name" not in frame.columns:
        return None
    pairs = [frame[["label", "label_name"]], frame[["suggested_label", "suggested_name"]]]
    found = {int(i): str(name) for pair in pairs for i, name in pair.drop_duplicates().to_numpy()}
    return [found.get(i, str(i)) for i in range(max(found) + 1)]


def from_label_ledger(path: str | os.PathLike[str]) -> tuple[pd.DataFrame, AuditData]:
    """The audit table of ``noise_ledger_labels.parquet``, a row for each label, and the samples behind it.

    Of a label that was dropped more often than kept the opposite is suggested. Ranked as the ledger is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such ledger, or does not hold every label.
    """
    frame = _read(Path(path))
    samples, labels = int(frame["index"].max()) + 1, int(frame["label"].max()) + 1
    entry = frame["index"] * labels + frame["label"]
    if len(frame) != samples * labels or entry.duplicated().any():
        raise ValueError(
            f"ledger '{path}' has {len(frame)} rows and not one for each of {labels} labels of {samples} "
            "samples; give the noise_ledger_labels.parquet of a run (its .csv holds the dropped labels only)"
        )
    frame = frame.assign(entry=entry).sort_values("entry")

    def grid(column: str) -> torch.Tensor:
        return torch.from_numpy(frame[column].to_numpy(np.int64).reshape(samples, labels).copy())

    data = AuditData(
        grid("given"),
        labels,
        frame["label_name"].head(labels).astype(str).tolist(),
        frame["path"].iloc[::labels].astype(str).tolist() if "path" in frame else None,
        grid("clean") if "clean" in frame else None,
    )
    entries, keep = label_entries(data), frame["keep"].to_numpy(bool)
    given = entries.label.numpy()
    extra = {name: frame[name].to_numpy() for name in ("times_seen", "times_dropped", "keep")}
    table = audit_table(
        given,
        frame["mean_log_p_clean"].to_numpy(),
        np.where(keep, given, given ^ 1),
        class_names=entries.class_names,
        path=entries.paths,
        clean_label=None if entries.clean_label is None else entries.clean_label.numpy(),
        extra=entry_columns(data.label.numpy()) | extra,
        order=np.argsort(frame["rank"].to_numpy(), kind="stable"),
    )
    return table, data


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    if not path.is_file():
        raise FileNotFoundError(f"no ledger '{path}'")
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"ledger '{path}' cannot be read: {error}") from error
    for column in _OF_LABELS:
        if column not in frame.columns:
            raise ValueError(
                f"ledger '{path}' has no column '{column}'; give the noise_ledger_labels.parquet of a run"
            )
    if not len(frame):
        raise ValueError(f"ledger '{path}' has no rows; give the noise_ledger_labels.parquet of a run")
    return frame
