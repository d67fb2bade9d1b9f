"""Find wrong labels with frozen embeddings or a run's ledger, and show them: scores, tables, report."""

from lightning_nrml.audit.data import AuditData, AuditOptions, AuditResult
from lightning_nrml.audit.labels import label_rates
from lightning_nrml.audit.ledger import from_label_ledger, from_ledger
from lightning_nrml.audit.noise_model import mixture_rate
from lightning_nrml.audit.report import ReportFacts, write_report
from lightning_nrml.audit.run import audit, audit_ledger, review_marks
from lightning_nrml.audit.scores import AuditScores, audit_label_scores, audit_scores
from lightning_nrml.audit.table import apply_review, audit_table, corrected_labels

__all__ = [
    "AuditData",
    "AuditOptions",
    "AuditResult",
    "AuditScores",
    "ReportFacts",
    "apply_review",
    "audit",
    "audit_label_scores",
    "audit_ledger",
    "audit_scores",
    "audit_table",
    "corrected_labels",
    "from_label_ledger",
    "from_ledger",
    "label_rates",
    "mixture_rate",
    "review_marks",
    "write_report",
]
