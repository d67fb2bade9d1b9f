"""What was decided about each training sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.memory.writes import check_index, check_size, check_vector, last_writer
from lightning_nrml.state import StateModule


class SampleLedger(StateModule):
    """Per-sample record of a noise filter's decisions, by dataset index; the source of every audit.

    Buffers have a fixed shape, are saved in checkpoints and written in place. Record *gathered* batches:
    the ledger is then equal on all ranks.

    Args:
        num_samples: size of the training set, at least 1.

    Attributes:
        seen: ``(N,)`` int64, how often the sample was in a batch.
        dropped: ``(N,)`` int64, how often its weight was 0.
        last_score: ``(N,)`` float32, the newest score, NaN = never scored.
        score_sum: ``(N,)`` float32, sum of all scores.
        score_count: ``(N,)`` int64, number of scores.
        suggested: ``(N,)`` int64, the newest suggested label, -1 = none.
        keep: ``(N,)`` bool, the decision of an epoch-level filter; True at the start.
        corrected: ``None``, or see :meth:`allow_corrections`.

    Raises:
        ValueError: if ``num_samples`` is not a positive whole number.
    """

    seen: Tensor
    dropped: Tensor
    last_score: Tensor
    score_sum: Tensor
    score_count: Tensor
    suggested: Tensor
    keep: Tensor
    corrected: Tensor | None

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        check_size(num_samples, "num_samples", "SampleLedger")
        self.num_samples = num_samples
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("dropped", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("last_score", torch.full((num_samples,), torch.nan, dtype=torch.float32))
        self.register_buffer("score_sum", torch.zeros(num_samples, dtype=torch.float32))
        self.register_buffer("score_count", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("suggested", torch.full((num_samples,), -1))
        self.register_buffer("keep", torch.ones(num_samples, dtype=torch.bool))
        self.register_buffer("corrected", None)

    @torch.no_grad()
    def record(self, index: Tensor, weight: Tensor, score: Tensor, suggested: Tensor | None = None) -> None:
        """Add one batch. A sample that is in the batch several times is counted as often.

        Args:
            index: ``(B,)`` dataset positions.
            weight: ``(B,)`` weights, below 1/2 (or NaN) = dropped; or ``(B, L)`` for multi-label data, where
                a sample counts as dropped when all its labels were.
            score: ``(B,)`` or ``(B, L)`` (mean over the labels); NaN = no opinion, leaves the score as it is.
            suggested: ``(B,)`` labels, -1 = no suggestion: leaves the old one.

        Raises:
            ValueError: if the shapes do not agree.
            IndexError: if an index is outside the training set (checked on the CPU only).
        """
        rows = len(index)
        kept = weight >= 0.5
        if kept.ndim == 2:
            kept = kept.any(dim=1)
        if score.ndim == 2:
            score = score.float().nanmean(dim=1)
        named = {"index": index, "weight": kept, "score": score, "suggested": suggested}
        for name, x in named.items():
            if x is not None:
                check_vector(x, rows, name, "SampleLedger.record")
        check_index(index, self.num_samples, "SampleLedger")
        index = index.to(self.seen.device, torch.int64)
        kept, score = kept.to(index.device), score.to(self.last_score)

        self.seen.index_add_(0, index, torch.ones_like(index))
        self.dropped.index_add_(0, index, (~kept).to(torch.int64))
        scored = ~score.isnan()
        self.score_sum.index_add_(0, index, torch.where(scored, score, 0.0))
        self.score_count.index_add_(0, index, scored.to(torch.int64))
        self._write_last(self.last_score, index, score, scored)
        if suggested is not None:
            suggested = suggested.to(self.suggested)
            self._write_last(self.suggested, index, suggested, suggested >= 0)

    def allow_corrections(self) -> None:
        """Add the buffer ``corrected`` ``(N,)`` int64: the label to train with, -1 = the given one."""
        if self.corrected is None:
            self.corrected = torch.full_like(self.suggested, -1)

    @torch.no_grad()
    def correct(self, index: Tensor, label: Tensor) -> None:
        """Set the labels to train with from now on.

        Args:
            index: ``(B,)`` dataset positions.
            label: ``(B,)`` int64, -1 = the given label again.

        Raises:
            RuntimeError: without :meth:`allow_corrections`.
        """
        if self.corrected is None:
            raise RuntimeError("This SampleLedger holds no corrected labels: call allow_corrections() first.")
        index = index.to(self.corrected.device)
        self._write_last(self.corrected, index, label.to(self.corrected), torch.ones_like(index).bool())

    def mean_score(self) -> Tensor:
        """``(N,)`` mean of all scores of each sample, NaN where there is none."""
        return torch.where(self.score_count > 0, self.score_sum / self.score_count, torch.nan)

    def kept(self) -> Tensor:
        """``(N,)`` bool, False where the whole-set decision, or most of its batches, dropped the sample."""
        return self.keep & (2 * self.dropped <= self.seen)

    def to_columns(self) -> dict[str, Tensor]:
        """The table of one row per sample, as CPU tensors ``(N,)``, ready for parquet or CSV."""
        columns = {
            "index": torch.arange(self.num_samples),
            "seen": self.seen,
            "dropped": self.dropped,
            "last_score": self.last_score,
            "mean_score": self.mean_score(),
            "suggested": self.suggested,
            "keep": self.keep,
        }
        return {name: column.detach().cpu().clone() for name, column in columns.items()}

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"num_samples={self.num_samples}"

    @staticmethod
    def _write_last(target: Tensor, index: Tensor, value: Tensor, valid: Tensor) -> None:
        source = last_writer(index, valid)
        target.index_copy_(0, index, torch.where(valid[source], value[source], target[index]))
