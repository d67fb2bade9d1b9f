"""The audit as a table, one row per training sample, and the corrected label table made from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lightning_nrml.data.tables import read_label_table, write_label_table

if TYPE_CHECKING:
    import pandas as pd

Rule = Literal["drop", "relabel"]
TABLE, CORRECTED, RATES = "audit", "labels_corrected", "audit_rates"
MARKS = ("wrong", "right", "unsure")


def audit_table(
    label: np.ndarray,
    log_p_clean: np.ndarray,
    suggested: np.ndarray,
    *,
    confidence: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    path: Sequence[str] | None = None,
    clean_label: np.ndarray | None = None,
    extra: dict[str, np.ndarray] | None = None,
    order: np.ndarray | None = None,
) -> pd.DataFrame:
    """The table, most suspicious sample first.

    Args:
        label: ``(N,)`` given class ids.
        log_p_clean: ``(N,)`` log-probability that they are right; NaN (never judged) goes last.
        suggested: ``(N,)`` class ids, -1 = none.
        confidence: ``(N,)`` probability of the suggested class.
        class_names: C names.
        path: N names of images.
        clean_label: ``(N,)`` true class ids, -1 = unknown.
        extra: further columns ``(N,)``, such as ``times_seen``, ``times_dropped``, ``epoch_3``.
        order: ``(N,)`` positions, most suspicious first; default by ``log_p_clean``.

    Returns:
        Columns ``index``, ``rank`` (1 = most suspicious), ``path``, ``label``, ``label_name``,
        ``suggested_label``, ``suggested_name``, ``confidence``, ``log_p_clean``, ``clean_label``, then the
        extra ones; those that are not known are left out.
    """
    import pandas as pd

    label, suggested = np.asarray(label), np.asarray(suggested)
    log_p_clean = np.asarray(log_p_clean, dtype=np.float32)
    if order is None:
        order = np.argsort(log_p_clean, kind="stable")  # NumPy sorts NaN last
    columns: dict[str, Any] = {"index": order, "rank": np.arange(1, len(order) + 1)}
    if path is not None:
        columns["path"] = np.asarray(path, dtype=object)[order]
    names = None if class_names is None else np.asarray([*class_names, ""], dtype=object)
    for name, ids in (("label", label), ("suggested_label", suggested)):
        columns[name] = ids[order]
        if names is not None:
            columns[name.removesuffix("_label") + "_name"] = names[ids[order]]
    if confidence is not None:
        columns["confidence"] = np.asarray(confidence, dtype=np.float32)[order]
    columns["log_p_clean"] = log_p_clean[order]
    if clean_label is not None:
        columns["clean_label"] = np.asarray(clean_label)[order]
    columns |= {name: np.asarray(values)[order] for name, values in (extra or {}).items()}
    return pd.DataFrame(columns)


def class_noise(frame: pd.DataFrame, calibrated: bool) -> pd.DataFrame:
    """Of each given class ``count``, the share of ``wrong`` labels as estimated, and in ``truth`` (or NaN).

    Args:
        frame: an audit table.
        calibrated: its ``log_p_clean`` holds real probabilities; else the labels not kept count as wrong.
    """
    import pandas as pd

    if calibrated:
        wrong = 1 - np.exp(frame["log_p_clean"].to_numpy(np.float64))
    else:
        wrong = (~frame["keep"]).to_numpy(np.float64)
    truth: Any = np.nan
    if "clean_label" in frame.columns:
        truth = (frame["clean_label"] != frame["label"]).to_numpy(np.float64)
    columns = {"label": frame["label"].to_numpy(), "wrong": wrong, "truth": truth, "count": 1}
    return pd.DataFrame(columns).groupby("label").agg({"count": "sum", "wrong": "mean", "truth": "mean"})


def differs(frame: pd.DataFrame) -> pd.Series:
    """In which rows of an audit table another label than the given one is suggested."""
    return (frame["suggested_label"] >= 0) & (frame["suggested_label"] != frame["label"])


def clean_known(frame: pd.DataFrame) -> bool:
    """Whether the true class of every sample of an audit table is known.

    Label tables made from it then say so: without that word nobody may take the labels that they replace, the
    doubted ones, for the truth.
    """
    return "clean_label" in frame.columns and bool((frame["clean_label"] >= 0).all())


def check_rule(rule: Rule, below: float, confident: float) -> None:
    """Refuse what :func:`corrected_labels` does not know.

    Raises:
        ValueError: an unknown rule, or a number outside [0, 1].
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule is '{rule}': choose one of {', '.join(get_args(Rule))}")
    for name, value in (("below", below), ("confident", confident)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a probability in [0, 1], got {value}")


def corrected_labels(
    frame: pd.DataFrame, rule: Rule = "drop", below: float = 0.5, confident: float = 0.9
) -> pd.DataFrame:
    """The label table to train on next, one row per sample in the order of ``index``.

    A label is doubted if P_clean is under ``below`` and another class is suggested. Rule ``drop`` sets
    ``keep`` to False there. Rule ``relabel`` takes the suggested class where its probability is at least
    ``confident``, and drops the other doubted ones. A ledger has no such probability: there the labels not
    kept are doubted, and only of multi-label data, where the opposite is the only other value, ``relabel``
    takes the suggestion, always.

    Args:
        frame: an audit table.
        rule: ``drop`` or ``relabel``.
        below: P_clean, in [0, 1].
        confident: probability, in [0, 1].

    Returns:
        Columns ``index``, ``path`` and ``label_name`` (if known), ``label`` (corrected), ``keep``,
        ``given_label``, ``action`` (``kept``, ``dropped`` or ``relabelled``) and, where the truth is known,
        ``clean_known``.

    Raises:
        ValueError: an unknown rule, a number outside [0, 1], or ``relabel`` without a ``confidence`` column.
    """
    check_rule(rule, below, confident)
    if rule == "relabel" and not {"confidence", "position"} & set(frame.columns):
        raise ValueError(
            "rule 'relabel' needs the confidence of the suggestions, which a ledger lacks: use 'drop'"
        )
    given, suggested = frame["label"].to_numpy(), frame["suggested_label"].to_numpy()
    doubted = np.exp(frame["log_p_clean"].to_numpy(dtype=np.float64)) < below  # False for NaN
    doubted &= suggested != given
    if "confidence" not in frame.columns:  # a ledger's scores are no calibrated probabilities
        doubted = ~frame["keep"].to_numpy(dtype=bool)
    relabel = np.zeros(len(frame), dtype=bool)
    if rule == "relabel":
        sure = frame["confidence"].to_numpy() >= confident if "confidence" in frame.columns else True
        relabel = doubted & sure & (suggested >= 0)
    action = np.where(relabel, "relabelled", np.where(doubted, "dropped", "kept"))
    return _labels(frame, np.where(relabel, suggested, given), action)


def _labels(frame: pd.DataFrame, label: np.ndarray, action: np.ndarray) -> pd.DataFrame:
    table = frame[[c for c in ("index", "path") if c in frame.columns]].copy()
    table["label"], table["keep"] = label, action != "dropped"
    table["given_label"], table["action"] = frame["label"].to_numpy(), action
    if {"label_name", "suggested_name"} <= set(frame.columns):
        named = np.where(action == "relabelled", frame["suggested_name"], frame["label_name"])
        table["label_name"] = named
    if clean_known(frame):
        table["clean_known"] = True
    return table.sort_values("index").reset_index(drop=True)


def read_review(
    review: str | os.PathLike[str],
    known: Sequence[int] | pd.Series,
    seen: pd.DataFrame | None = None,
    num_classes: int | None = None,
    path: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The rows of a review (the report's export) that a person marked.

    Args:
        review: CSV with ``index``, ``label``, ``keep`` and ``mark``; rows without a mark do not count.
        known: the indices of the samples.
        seen: such a table, read from ``review`` already.
        num_classes: of the labels, if they are classes.
        path: names of the samples, each once. If the review has names, too, they say which sample is meant:
            positions move when a file is added, renamed or missing.

    Raises:
        ValueError: a column is missing, an index or a name is not known, or a label is no class.
    """
    seen = read_label_table(review) if seen is None else seen
    for column in ("index", "keep", "mark"):
        if column not in seen.columns:
            raise ValueError(
                f"review '{review}' has no column '{column}'; give the CSV that the report saved"
            )
    seen = seen[seen["mark"].isin(MARKS)]
    if path is not None and "path" in seen.columns:
        position = {name: i for i, name in enumerate(path)}
        strange = ~seen["path"].isin(position.keys())
        if strange.any():
            first = seen["path"][strange].iloc[0]
            raise ValueError(f"review '{review}' names '{first}', which the data lack; it is of another run")
        seen = seen.assign(index=seen["path"].map(position).astype(np.int64))
    unknown = ~seen["index"].isin(known).to_numpy()
    if unknown.any():
        row = int(seen["index"].to_numpy()[unknown][0])
        raise ValueError(
            f"review '{review}' names index {row}, which the table has not; it is of another run"
        )
    odd = ~seen["label"].between(0, (num_classes or np.iinfo(np.int64).max) - 1)
    if odd.any():
        first = seen[odd].iloc[0]
        raise ValueError(
            f"review '{review}', index {first['index']}: label {first['label']} is none of the {num_classes} "
            "classes; mend it, or leave the mark out"
        )
    return seen


def apply_review(table: pd.DataFrame, review: str | os.PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    """Lay the marks of a person over a corrected table; they win.

    Args:
        table: from :func:`corrected_labels`.
        review: from :func:`read_review`, or the file that it reads.

    Raises:
        ValueError: see :func:`read_review`.
    """
    import pandas as pd

    seen = review if isinstance(review, pd.DataFrame) else read_review(review, table["index"])
    out = table.set_index("index")
    at = seen["index"].to_numpy()
    changed = seen["label"].to_numpy() != out.loc[at, "given_label"].to_numpy()
    out.loc[at, "label"], out.loc[at, "keep"] = seen["label"].to_numpy(), seen["keep"].to_numpy(dtype=bool)
    action = np.where(~seen["keep"].to_numpy(dtype=bool), "dropped", np.where(changed, "relabelled", "kept"))
    out.loc[at, "action"] = action
    if "label_name" in out.columns:
        names = table.drop_duplicates("label").set_index("label")["label_name"]
        out["label_name"] = out["label"].map(names).fillna(out["label"].astype(str))
    return out.reset_index()


def write_both(folder: Path, stem: str, frame: pd.DataFrame) -> Path:
    """``<stem>.parquet`` and ``<stem>.csv``, each whole or not at all; returns the path of the CSV."""
    write_label_table(folder / f"{stem}.parquet", frame)
    return write_label_table(folder / f"{stem}.csv", frame)
