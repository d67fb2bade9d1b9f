"""The per-sample ledger as files: one row per training sample, for audits and corrected label tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_nrml.memory import SampleLedger

if TYPE_CHECKING:
    import pandas as pd


def ledger_frame(ledger: SampleLedger, datamodule: Any = None) -> pd.DataFrame:
    """Table with one row per training sample, most suspicious first.

    Columns: ``index``, ``path`` and ``label`` (if the datamodule knows them), ``suggested_label``,
    ``log_p_clean`` (last score), ``mean_log_p_clean``, ``times_seen``, ``times_dropped``, ``keep`` (False
    if the whole-set decision, or most of its batches, dropped the sample),
    ``rank`` (1 = most suspicious) and, where the truth is known, ``clean_label``.
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
            columns[name] = value.tolist() if isinstance(value, torch.Tensor) else list(value)
    columns |= {
        "suggested_label": ledger.suggested.tolist(),
        "log_p_clean": ledger.last_score.tolist(),
        "mean_log_p_clean": ledger.mean_score().tolist(),
        "times_seen": ledger.seen.tolist(),
        "times_dropped": ledger.dropped.tolist(),
        "keep": (ledger.keep & (2 * ledger.dropped <= ledger.seen)).tolist(),
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


def write_ledger(ledger: SampleLedger, datamodule: Any, folder: Path) -> Path:
    """Write ``noise_ledger.parquet`` and ``noise_ledger.csv``, each atomically; returns the CSV's path."""
    frame = ledger_frame(ledger, datamodule)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("parquet", "csv"):
        target, part = folder / f"noise_ledger.{suffix}", folder / f".noise_ledger.{suffix}.part"
        if suffix == "parquet":
            frame.to_parquet(part, index=False)
        else:
            frame.to_csv(part, index=False)
        os.replace(part, target)
    return folder / "noise_ledger.csv"
