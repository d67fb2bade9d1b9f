"""From embeddings (or a ledger) to the files of an audit."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_nrml.audit.labels import (
    corrected_samples,
    entries_of,
    entry_columns,
    entry_scores,
    label_entries,
)
from lightning_nrml.audit.report import Images, ReportFacts, write_report
from lightning_nrml.audit.scores import (
    AuditScores,
    Evidence,
    audit_label_scores,
    audit_scores,
    mixture_rate,
)
from lightning_nrml.audit.table import (
    CORRECTED,
    TABLE,
    Rule,
    apply_review,
    audit_table,
    corrected_labels,
    from_ledger,
    write_both,
)
from lightning_nrml.metrics.search import prepare_rows, topk_search

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class AuditOptions:
    """How to audit.

    Args:
        evidence: ``both`` (centres and neighbours), ``centres``, ``knn``, or ``auto``: both, but centres
            alone beyond 200,000 samples on a CPU.
        k: neighbours that vote.
        rule: what the corrected table does with doubted labels: ``drop`` or ``relabel``.
        below: labels with P_clean under this are doubted.
        confident: ``relabel`` takes suggestions of at least this probability and drops the rest.
        gallery: suspicious samples with thumbnails in the report.
        neighbours: trusted neighbours shown beside each.
        review: CSV saved from a report; its marks win over the rule.
    """

    evidence: Evidence = "auto"
    k: int = 20
    rule: Rule = "drop"
    below: float = 0.5
    confident: float = 0.9
    gallery: int = 200
    neighbours: int = 4
    review: str | None = None

    def __post_init__(self) -> None:
        if self.k < 1 or self.gallery < 1 or self.neighbours < 0:
            raise ValueError(
                f"k ({self.k}) and gallery ({self.gallery}) must be at least 1, neighbours "
                f"({self.neighbours}) at least 0."
            )
        if self.review is not None and not Path(self.review).is_file():
            raise FileNotFoundError(
                f"review '{self.review}' does not exist; give the CSV that a report saved."
            )


@dataclass
class AuditData:
    """The training set as the audit sees it.

    Args:
        label: ``(N,)`` int64 given labels; or ``(N, L)`` of 0 and 1, see :mod:`lightning_nrml.audit.labels`.
        num_classes: C (L for multi-label data).
        class_names: names by class id.
        paths: N names of images.
        clean_label: true labels of the same shape, -1 = none of the classes; used for measuring only.
        images: pixels by index, for thumbnails.
    """

    label: Tensor
    num_classes: int
    class_names: list[str] | None = None
    paths: list[str] | None = None
    clean_label: Tensor | None = None
    images: Images | None = None


@dataclass(frozen=True)
class AuditResult:
    """Files and findings of an audit.

    Attributes:
        table: the audit table.
        corrected: the corrected label table.
        noise_rate: estimated share of wrong labels.
        files: ``report``, ``table``, ``corrected``, ``summary``.
        neighbours: index -> nearest trusted ``(index, cosine)``, of the samples in the gallery.
    """

    table: pd.DataFrame
    corrected: pd.DataFrame
    noise_rate: float
    files: dict[str, Path]
    neighbours: dict[int, list[tuple[int, float]]] = field(default_factory=dict)


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
    at = torch.arange(len(data.label)) if index is None else index.cpu()
    samples = data if data.label.ndim == 2 else None
    if samples is not None:
        rows, labels = data.label.shape
        judged = audit_label_scores(embedding, data.label[at], options.evidence, options.k)
        judged, at, data = entry_scores(judged, labels), entries_of(at, labels), label_entries(data)
        extra = entry_columns(rows, labels) | (extra or {})
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
    near = {} if samples else _trusted_neighbours(embedding, at, data.label, scores, frame, options)
    shown = {**(facts or {}), "embedding": f"{embedding.shape[1]} numbers", **_method(scores, options)}
    counted = dict(zip(("samples", "labels of each"), samples.label.shape, strict=True)) if samples else None
    report = ReportFacts("Label audit", shown, scores.noise_rate, True, near, counted)
    return _write(folder, frame, data, options, report, samples)


def audit_ledger(
    path: str | os.PathLike[str],
    folder: Path,
    options: AuditOptions | None = None,
    data: AuditData | None = None,
) -> AuditResult:
    """The same from a run's noise ledger alone: the filter's scores, no embeddings.

    Args:
        path: ``noise_ledger.parquet`` or ``.csv``.
        folder: made if it is missing.
        options: ``rule`` must be ``drop``.
        data: class names and images, if they are at hand.
    """
    options = options or AuditOptions()
    frame = from_ledger(path)
    if "label" not in frame.columns:
        raise ValueError(f"ledger '{path}' has no column 'label'; its run used a datamodule without labels")
    rate = mixture_rate(torch.from_numpy(frame["log_p_clean"].to_numpy(dtype=np.float32, copy=True)))
    facts = {"ledger": str(path), "scores": "mean log P_clean of the run's noise filter (relative)"}
    facts["estimate of wrong labels"] = "lower of two Gaussians fitted to the scores"
    report = ReportFacts("Label audit (ledger)", facts, rate, False)
    label = torch.from_numpy(frame.sort_values("index")["label"].to_numpy(copy=True))
    data = data or AuditData(label, int(label.max()) + 1)
    return _write(folder, frame, data, options, report)


def _method(scores: AuditScores, options: AuditOptions) -> dict[str, str]:
    fitted = ", ".join(f"{name} {value:.3g}" for name, value in scores.parameters.items())
    return {
        "scores": f"out-of-sample, evidence: {options.evidence}, {options.k} neighbours",
        "fitted noise model": fitted,
        "corrected table": f"rule {options.rule}, doubted below P_clean {options.below:g}",
    }


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
    return AuditScores(columns[0], columns[1], columns[2], judged.noise_rate, judged.parameters)


def _trusted_neighbours(
    embedding: Tensor,
    at: Tensor,
    label: Tensor,
    scores: AuditScores,
    frame: pd.DataFrame,
    options: AuditOptions,
) -> dict[int, list[tuple[int, float]]]:
    """The nearest samples whose own label is trusted, of the samples in the gallery."""
    trusted = (scores.log_p_clean[at].exp() >= 0.5) & (scores.suggested[at] == label[at])
    gallery = trusted.nonzero()[:, 0]
    if not len(gallery) or not options.neighbours:
        return {}
    place = torch.full((len(label),), -1)  # index -> row of the embeddings
    place[at] = torch.arange(len(at))
    suspects = torch.from_numpy(frame["index"].head(options.gallery).to_numpy(copy=True))
    suspects = suspects[place[suspects] >= 0]
    itself = torch.full((len(at),), -1)  # row of the embeddings -> row of the gallery
    itself[gallery] = torch.arange(len(gallery))
    row = prepare_rows(embedding.cpu(), "cosine", "embedding")
    query = place[suspects]
    value, found = topk_search(
        row[query], row[gallery], options.neighbours, exclude=itself[query], similarity="dot"
    )
    out = {}
    for suspect, values, indices in zip(suspects.tolist(), value.tolist(), found.tolist(), strict=True):
        out[suspect] = [(int(at[gallery[i]]), v) for i, v in zip(indices, values, strict=True) if i >= 0]
    return out


def _write(
    folder: Path,
    frame: pd.DataFrame,
    data: AuditData,
    options: AuditOptions,
    report: ReportFacts,
    samples: AuditData | None = None,
) -> AuditResult:
    """Table, corrected labels, report and summary; ``samples`` are multi-label ones behind the entries."""
    corrected = corrected_labels(frame, options.rule, options.below, options.confident)
    if options.review is not None:
        corrected = apply_review(corrected, options.review)
    made = write_both(folder, CORRECTED, corrected) if samples is None else _wide(folder, corrected, samples)
    files = {
        "table": write_both(folder, TABLE, frame),
        "corrected": made,
        "report": write_report(
            folder / "report.html", frame, report, data.images, data.class_names, options.gallery
        ),
        "summary": folder / "audit.json",
    }
    summary: dict[str, Any] = {
        "samples": len(frame),
        "noise_rate": None if np.isnan(report.noise_rate) else round(report.noise_rate, 6),
        "corrected": {k: int(v) for k, v in corrected["action"].value_counts().items()},
        **report.facts,
    }
    part = folder / ".audit.json.part"
    part.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    os.replace(part, files["summary"])
    return AuditResult(frame, corrected, report.noise_rate, files, report.neighbours)


def _wide(folder: Path, corrected: pd.DataFrame, samples: AuditData) -> Path:
    """The corrected labels of multi-label data, a column for each."""
    table = corrected_samples(corrected, samples)
    return write_both(folder, CORRECTED, table, column=str(table.columns[1]))
