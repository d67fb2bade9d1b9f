"""The per-sample ledger as files: one row per training sample, for audits and corrected label tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_nrml.callbacks.label_ledger_file import in_words, label_frame, label_names
from lightning_nrml.files import write_frame
from lightning_nrml.memory import LabelLedger, SampleLedger

if TYPE_CHECKING:
    import pandas as pd


def ledger_frame(ledger: SampleLedger, datamodule: Any = None) -> pd.DataFrame:
    """Table with one row per training sample, most suspicious first.

    Of multi-label data ``label``, ``suggested_label`` and ``clean_label`` are the names of the labels, joined
    by ``;``, and the scores are means over the labels.

    Columns: ``index``, ``path`` and ``label`` (if the datamodule knows them), ``suggested_label``,
    ``label_name`` and ``suggested_name`` (if classes have names), ``log_p_clean`` (last score),
    ``mean_log_p_clean``, ``times_seen``, ``times_dropped``, ``keep`` (False if the whole-set decision, or
    most of its batches, dropped the sample), ``rank`` (1 = most suspicious) and, where the truth is known,
    ``clean_label``.
    """
    import pandas as pd

    columns: dict[str, Any] = {"index": range(len(ledger.seen))}
    for name, attribute in (
        ("path", "train_paths"),
        ("label", "train_label"),
        ("clean_label", "train_clean_label"),
    ):
        value = getattr(datamodule, attribute, None)
        if value is not None:
            columns[name] = _column(value, datamodule)
    columns["suggested_label"] = _suggested(ledger, datamodule)
    columns |= _named(columns, getattr(datamodule, "class_names", None))
    columns |= {
        "log_p_clean": ledger.last_score.tolist(),
        "mean_log_p_clean": ledger.mean_score().tolist(),
        "times_seen": ledger.seen.tolist(),
        "times_dropped": ledger.dropped.tolist(),
        "keep": ledger.kept().tolist(),
    }
    frame = pd.DataFrame(columns)
    share = frame["times_dropped"] / frame["times_seen"].clip(lower=1)
    order = (
        frame.assign(_share=share)
        .sort_values(["_share", "mean_log_p_clean"], ascending=[False, True], na_position="last")
        .index
    )
    frame = frame.loc[order].reset_index(drop=True)
    frame.insert(1, "rank", range(1, len(frame) + 1))
    return frame


def _column(value: Any, datamodule: Any) -> list[Any]:
    if isinstance(value, torch.Tensor) and value.ndim == 2:
        return in_words(value, label_names(datamodule, value.shape[1]))
    return value.tolist() if isinstance(value, torch.Tensor) else list(value)


def _suggested(ledger: SampleLedger, datamodule: Any) -> list[Any]:
    """Labels that the filter thinks right: of multi-label data the given ones, the doubted ones turned."""
    given = getattr(datamodule, "train_label", None)
    if not isinstance(ledger, LabelLedger) or given is None:
        return ledger.suggested.tolist()
    turned = (given > 0) ^ ledger.doubted().cpu()
    return in_words(turned, label_names(datamodule, ledger.num_labels))


def _named(columns: dict[str, Any], names: Sequence[str] | None) -> dict[str, list[str]]:
    """Names of given and suggested classes, empty for none; of multi-label data these are words already."""
    if names is None or isinstance(next(iter(columns.get("label", ())), None), str):
        return {}
    text = {-1: "", **dict(enumerate(names))}
    ids = {"label_name": columns.get("label"), "suggested_name": columns["suggested_label"]}
    return {name: [text[i] for i in column] for name, column in ids.items() if column is not None}


def write_ledger(ledger: SampleLedger, datamodule: Any, folder: Path) -> Path:
    """Write ``noise_ledger.parquet`` and ``noise_ledger.csv``, each atomically; returns the CSV's path.

    Of multi-label data there is also ``noise_ledger_labels``, see :func:`label_frame`: every label in the
    parquet, which ``nrml audit --ledger`` reads, and in the CSV those that were ever dropped.
    """
    frames = {"noise_ledger": ledger_frame(ledger, datamodule)}
    if isinstance(ledger, LabelLedger) and getattr(datamodule, "train_label", None) is not None:
        frames["noise_ledger_labels"] = label_frame(ledger, datamodule)
    for stem, frame in frames.items():
        for suffix in ("parquet", "csv"):
            short = suffix == "csv" and stem.endswith("labels")
            rows = frame[frame["times_dropped"] > 0] if short else frame
            write_frame(folder / f"{stem}.{suffix}", rows)
    return folder / "noise_ledger.csv"
