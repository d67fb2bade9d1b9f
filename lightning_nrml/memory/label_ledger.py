"""What was decided about each label of each training sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.memory.ledger import SampleLedger
from lightning_nrml.memory.writes import check_size

_LOWEST = torch.finfo(torch.float16).min


class LabelLedger(SampleLedger):
    """A :class:`SampleLedger` that also keeps a record of every label of multi-label data.

    The record of the sample is made from those of its labels: it counts as dropped when all of its labels
    were, and its score is their mean. A weight below one half counts as dropped. That a label was seen needs
    no buffer, as all labels of a sample are seen together. 10 bytes for each label: 114 MB for 600,000
    samples of 19 labels, and 25 MB for the samples. Labels may be visited 32,767 times.

    Args:
        num_samples: size of the training set ``N``, at least 1.
        num_labels: labels ``L``, at least 1.

    Attributes:
        label_dropped: ``(N, L)`` int16, how often the label's weight was below one half.
        label_last_score: ``(N, L)`` float16, its newest score, NaN = never scored.
        label_score_sum: ``(N, L)`` float32, sum of all its scores.
        label_score_count: ``(N, L)`` int16, number of its scores.

    Raises:
        ValueError: if a size is not a positive whole number.
    """

    label_dropped: Tensor
    label_last_score: Tensor
    label_score_sum: Tensor
    label_score_count: Tensor

    def __init__(self, num_samples: int, num_labels: int) -> None:
        super().__init__(num_samples)
        check_size(num_labels, "num_labels", "LabelLedger")
        self.num_labels = num_labels
        shape = (num_samples, num_labels)
        self.register_buffer("label_dropped", torch.zeros(shape, dtype=torch.int16))
        self.register_buffer("label_last_score", torch.full(shape, torch.nan, dtype=torch.float16))
        self.register_buffer("label_score_sum", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("label_score_count", torch.zeros(shape, dtype=torch.int16))

    @torch.no_grad()
    def record(self, index: Tensor, weight: Tensor, score: Tensor, suggested: Tensor | None = None) -> None:
        """Add one batch. A sample that is in the batch several times is counted as often.

        Args:
            index: ``(B,)`` dataset positions.
            weight: ``(B, L)`` weights; below one half or NaN = dropped.
            score: ``(B, L)``; NaN = no opinion, leaves the score as it is.
            suggested: not used: the only other value of a label is ``1 - label``.

        Raises:
            ValueError: if the shapes do not agree.
            IndexError: if an index is outside the training set (checked on the CPU only).
        """
        shape = (len(index), self.num_labels)
        for name, x in (("weight", weight), ("score", score)):
            if x.shape != shape:
                raise ValueError(
                    f"LabelLedger.record: '{name}' must have shape {shape}, got {tuple(x.shape)}."
                )
        trusted = weight >= 0.5
        super().record(index, trusted.float(), score)
        index = index.to(self.seen.device, torch.int64)
        dropped = (~trusted).to(self.label_dropped)
        score = score.to(self.label_score_sum)
        scored = ~score.isnan()
        self.label_dropped.index_add_(0, index, dropped)
        self.label_score_sum.index_add_(0, index, score.nan_to_num(0.0, neginf=_LOWEST))
        self.label_score_count.index_add_(0, index, scored.to(torch.int16))
        last = score.clamp_min(_LOWEST).to(self.label_last_score)
        place = index.unsqueeze(1) * self.num_labels + torch.arange(self.num_labels, device=index.device)
        self._write_last(self.label_last_score.view(-1), place.view(-1), last.view(-1), scored.view(-1))

    def label_mean_score(self) -> Tensor:
        """``(N, L)`` float32 mean of all scores of each label, NaN where there is none."""
        count = self.label_score_count
        return torch.where(count > 0, self.label_score_sum / count.clamp_min(1), torch.nan)

    def doubted(self) -> Tensor:
        """``(N, L)`` bool, labels that were dropped more often than kept."""
        return 2 * self.label_dropped.int() > self.seen.unsqueeze(1)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"{super().extra_repr()}, num_labels={self.num_labels}"
