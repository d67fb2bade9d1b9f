"""From embeddings (or a ledger) to the files of an audit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_nrml.audit.data import AuditData, AuditOptions, AuditResult
from lightning_nrml.audit.labels import (
    corrected_samples,
    entries_of,
    entry_columns,
    entry_scores,
    label_entries,
    label_rates,
    reviewed_entries,
    sample_paths,
)
from lightning_nrml.audit.ledger import find_label_ledger, from_label_ledger, from_ledger, ledger_names
from lightning_nrml.audit.neighbours import trusted_neighbours
from lightning_nrml.audit.noise_model import mixture_rate
from lightning_nrml.audit.report import ReportFacts, shown_rows, write_report
from lightning_nrml.audit.scores import AuditScores, audit_label_scores, audit_scores
from lightning_nrml.audit.table import (
    CORRECTED,
    RATES,
    TABLE,
    apply_review,
    audit_table,
    corrected_labels,
    differs,
    read_review,
    write_both,
)
from lightning_nrml.data.tables import write_label_table
from lightning_nrml.files import write_frame, write_text

if TYPE_CHECKING:
    import pandas as pd


def audit(
    embedding: Tensor,
    data: AuditData,
    folder: Path,
    options: AuditOptions | None = None,
    facts: dict[str, str] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    index: Tensor | None = None,
) -> AuditResult:
    """Score, rank, correct and show; writes everything into ``folder``.

    Args:
        embedding: ``(M, D)`` frozen features.
        data: the N labels, and what is known beside them.
        folder: made if it is missing.
        options: see :class:`AuditOptions`.
        facts: rows for the report's run facts.
        extra: further columns ``(N,)`` of the table.
        index: ``(M,)`` which samples the embeddings belong to (images may be unreadable); ``None`` = all.
            The others are not judged: ``log_p_clean`` NaN, kept, last in the table.

    Raises:
        ValueError: shapes that do not fit, or NaN in the embedding.
    """
    options = options or AuditOptions()
    rows = at = torch.arange(len(data.label)) if index is None else index.cpu()
    samples, labels = (data, data.num_classes) if data.label.ndim == 2 else (None, 1)
    seen = review_marks(options, data)
    if samples is not None:
        judged = audit_label_scores(embedding, data.label[at], options.evidence, options.k)
        judged, at, data = entry_scores(judged, labels), entries_of(at, labels), label_entries(data)
        extra = entry_columns(samples.label.numpy()) | (extra or {})
    else:
        judged = audit_scores(embedding, data.label[at], data.num_classes, options.evidence, options.k)
    scores = _spread(judged, at, len(data.label))
    frame = audit_table(
        data.label.numpy(),
        scores.log_p_clean.numpy(),
        scores.suggested.numpy(),
        confidence=scores.confidence.numpy(),
        class_names=data.class_names,
        path=data.paths,
        clean_label=None if data.clean_label is None else data.clean_label.numpy(),
        extra=extra,
    )
    suspects = torch.from_numpy(shown_rows(frame, options.gallery)["index"].to_numpy(copy=True))
    near = trusted_neighbours(embedding, rows, data.label, scores, suspects, options.neighbours, labels)
    shown = {
        **(facts or {}),
        "embedding": f"{embedding.shape[1]} numbers",
        **_method(scores, options, data.class_names),
    }
    report = ReportFacts("Label audit", shown, scores.noise_rate, True, near)
    return _write(folder, frame, data, options, report, seen, samples)


def review_marks(options: AuditOptions, data: AuditData) -> pd.DataFrame | None:
    """The marks of ``options.review`` on ``data``; read first of all, so that a wrong file costs no work.

    Raises:
        ValueError: the file is no review, or one of other data.
    """
    if options.review is None:
        return None
    known = range(data.label.numel())
    if data.label.ndim == 2:
        return read_review(options.review, known, reviewed_entries(options.review, data))
    return read_review(options.review, known, num_classes=data.num_classes, path=sample_paths(data))


def audit_ledger(
    path: str | os.PathLike[str],
    folder: Path,
    options: AuditOptions | None = None,
    pixels: Callable[[list[str]], np.ndarray] | None = None,
) -> AuditResult:
    """The same from a run's noise ledger alone: the filter's scores, no embeddings.

    Args:
        path: ``noise_ledger.parquet`` or ``.csv``; of a multi-label run ``noise_ledger_labels.parquet``, or
            one of the two beside it.
        folder: made if it is missing.
        options: ``rule`` must be ``drop``, but for multi-label data.
        pixels: paths as the ledger has them -> uint8 ``(n, C, H, W)``, for thumbnails.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ledger, or lacks the labels or paths.
    """
    options = options or AuditOptions()
    of_labels = find_label_ledger(path)
    samples = None
    if of_labels is not None:
        path = of_labels
        frame, samples = from_label_ledger(path)
    else:
        frame = from_ledger(path)
    if "label" not in frame.columns:
        raise ValueError(f"ledger '{path}' has no column 'label'; its run used a datamodule without labels")
    rate = mixture_rate(torch.from_numpy(frame["log_p_clean"].to_numpy(dtype=np.float32, copy=True)))
    facts = {"ledger": str(path), "scores": "mean log P_clean of the run's noise filter (relative)"}
    facts["estimate of wrong labels"] = "lower of two Gaussians fitted to the scores"
    report = ReportFacts("Label audit (ledger)", facts, rate, False)
    data = samples
    if data is None:
        by_index = frame.sort_values("index")
        label = torch.from_numpy(by_index["label"].to_numpy(copy=True))
        paths = by_index["path"].tolist() if "path" in by_index else None
        data = AuditData(label, int(label.max()) + 1, ledger_names(frame), paths)
    if pixels is not None:
        names = data.paths
        if names is None:
            raise ValueError(f"ledger '{path}' has no paths, so there are no images to show")
        data.images = lambda rows: pixels([names[i] for i in rows])
    seen = review_marks(options, data)
    # the entries' names, a string for each, are in the table already
    entries = data if samples is None else label_entries(replace(data, paths=None))
    return _write(folder, frame, entries, options, report, seen, samples)


def _method(scores: AuditScores, options: AuditOptions, class_names: Sequence[str] | None) -> dict[str, str]:
    fitted = ", ".join(f"{name} {value:.3g}" for name, value in scores.parameters.items())
    facts = {
        "scores": f"out-of-sample, evidence: {options.evidence}, {options.k} neighbours",
        "fitted noise model": fitted,
        "corrected table": f"rule {options.rule}, doubted below P_clean {options.below:g}",
    }
    if scores.confusion is not None:
        facts["most often given as another class"] = _most_confused(scores.confusion, class_names)
    return facts


def _most_confused(confusion: Tensor, class_names: Sequence[str] | None, count: int = 3) -> str:
    """The ``count`` largest chances, as in ``cat as dog 14%``."""
    names = class_names or [str(c) for c in range(len(confusion))]
    chance = confusion.clone().fill_diagonal_(-1)
    value, place = chance.flatten().topk(count)
    pairs = [divmod(i, len(confusion)) for i in place.tolist()]
    return ", ".join(
        f"{names[c]} as {names[j]} {v:.0%}" for (c, j), v in zip(pairs, value.tolist(), strict=True)
    )


def _spread(judged: AuditScores, at: Tensor, num_samples: int) -> AuditScores:
    """The scores of all samples, on the CPU, from those of the samples ``at``."""
    columns = []
    for value, empty in (
        (judged.log_p_clean, torch.nan),
        (judged.suggested, -1),
        (judged.confidence, torch.nan),
    ):
        column = torch.full((num_samples,), empty, dtype=value.dtype)
        column[at] = value.cpu()
        columns.append(column)
    return AuditScores(
        columns[0], columns[1], columns[2], judged.noise_rate, judged.parameters, judged.confusion
    )


def _write(
    folder: Path,
    frame: pd.DataFrame,
    data: AuditData,
    options: AuditOptions,
    report: ReportFacts,
    seen: pd.DataFrame | None,
    samples: AuditData | None,
) -> AuditResult:
    """Table, corrected labels, report and summary; ``samples`` are multi-label ones behind the entries."""
    corrected = corrected_labels(frame, options.rule, options.below, options.confident)
    if seen is not None:
        corrected = apply_review(corrected, seen)
    report.sample_paths = sample_paths(data if samples is None else samples)
    rates = None
    if samples is None:
        files = {
            "table": write_both(folder, TABLE, frame),
            "corrected": write_both(folder, CORRECTED, corrected),
        }
    else:
        report.labels = samples.num_classes
        rates = label_rates(frame, report.calibrated)
        stems = {"table": TABLE, "corrected": CORRECTED, "rates": RATES}
        files = {name: folder / f"{stem}.csv" for name, stem in stems.items()}
        write_label_table(files["table"].with_suffix(".parquet"), frame)
        # of each label of each sample: millions of rows, which nobody reads in full
        write_frame(files["table"], frame[differs(frame)])
        wide = corrected_samples(corrected, samples)
        for suffix in (".parquet", ".csv"):
            write_frame(files["corrected"].with_suffix(suffix), wide)
        write_frame(files["rates"], rates)
    files["report"] = write_report(
        folder / "report.html", frame, report, data.images, data.class_names, options.gallery
    )
    files["summary"] = folder / "audit.json"
    summary: dict[str, Any] = {
        "samples": len(frame) if samples is None else len(samples.label),
        **({} if samples is None else {"labels": len(frame)}),
        "noise_rate": None if np.isnan(report.noise_rate) else round(report.noise_rate, 6),
        "corrected": {k: int(v) for k, v in corrected["action"].value_counts().items()},
        **report.facts,
    }
    write_text(files["summary"], json.dumps(summary, indent=2))
    return AuditResult(frame, corrected, report.noise_rate, files, report.neighbours, rates)
