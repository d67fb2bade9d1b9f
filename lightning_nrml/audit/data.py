"""What an audit takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_nrml.audit.neighbours import Neighbours
from lightning_nrml.audit.report import Images
from lightning_nrml.audit.scores import Evidence, check_evidence
from lightning_nrml.audit.table import Rule, check_rule
from lightning_nrml.data.multilabel_writing import check_label_names

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
        check_evidence(self.evidence)
        check_rule(self.rule, self.below, self.confident)
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

    Raises:
        ValueError: two of several labels have one name, or one is called like a remark.
    """

    label: Tensor
    num_classes: int
    class_names: list[str] | None = None
    paths: list[str] | None = None
    clean_label: Tensor | None = None
    images: Images | None = None

    def __post_init__(self) -> None:
        if self.label.ndim == 2 and self.class_names is not None:
            check_label_names(self.class_names, "the corrected table")


@dataclass(frozen=True)
class AuditResult:
    """Files and findings of an audit.

    Attributes:
        table: the audit table.
        corrected: the corrected label table.
        noise_rate: estimated share of wrong labels.
        files: ``report``, ``table``, ``corrected``, ``summary``; of multi-label data also ``rates``.
        neighbours: index -> nearest trusted ``(index, cosine)``, of the samples in the gallery.
        rates: of multi-label data what is extra and missing of each label, see
            :func:`~lightning_nrml.audit.labels.label_rates`.
    """

    table: pd.DataFrame
    corrected: pd.DataFrame
    noise_rate: float
    files: dict[str, Path]
    neighbours: Neighbours = field(default_factory=dict)
    rates: pd.DataFrame | None = None
