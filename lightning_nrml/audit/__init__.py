"""Find wrong labels with frozen embeddings or a run's ledger, and show them: scores, tables, report."""

from lightning_nrml.audit.report import ReportFacts, write_report
from lightning_nrml.audit.run import AuditData, AuditOptions, AuditResult, audit, audit_ledger
from lightning_nrml.audit.scores import AuditScores, audit_label_scores, audit_scores, mixture_rate
from lightning_nrml.audit.table import apply_review, audit_table, corrected_labels, from_ledger

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
    "from_ledger",
    "mixture_rate",
    "write_report",
]
