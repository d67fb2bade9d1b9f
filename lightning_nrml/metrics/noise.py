"""How well a filter tells clean from wrong labels, where the truth is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

NAMES = ("precision", "recall", "keep_rate", "f1", "auroc", "auroc_sd", "average_precision")


def filter_quality(keep: Tensor, is_noise: Tensor, score: Tensor | None = None) -> dict[str, float]:
    """Precision, recall, F1 and keep rate of the kept set, AUROC and average precision of the score.

    Clean is the positive class, but for ``average_precision``, which says how well the *wrong* labels are
    found from the lowest score upwards.

    Args:
        keep: ``(B,)`` bool, or weights of which those > 0 are kept (any shape, e.g. ``(B, L)``).
        is_noise: bool of the same shape, True where the given label is wrong.
        score: of the same shape, higher = cleaner (``P_clean`` or its logarithm); NaN = no opinion, left
            out of AUROC and average precision only.

    Returns:
        ``precision`` = P(clean | kept), ``recall`` = P(kept | clean), ``keep_rate``, ``f1``, ``auroc`` =
        P(score of a clean > score of a noisy sample) + P(equal) / 2, and ``auroc_sd``, its standard
        deviation by DeLong et al., Biometrics 44 (1988); ``average_precision``, see
        :func:`average_precision`. Undefined values (nothing kept, no noise, no score) are NaN.

    Raises:
        ValueError: if the shapes differ.
    """
    counts, parts = _reduce(keep, is_noise, score)
    return _result(counts, *parts)


def _reduce(keep: Tensor, is_noise: Tensor, score: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``(4,)`` counts of all, kept, clean, clean and kept; and the scores with their noise flags."""
    if keep.shape != is_noise.shape or (score is not None and score.shape != keep.shape):
        shapes = [tuple(keep.shape), tuple(is_noise.shape), None if score is None else tuple(score.shape)]
        raise ValueError(f"keep, is_noise and score must have the same shape, got {shapes}.")
    kept, clean = keep.detach().flatten() > 0, ~is_noise.detach().flatten().bool()
    total = torch.full_like(kept, True)
    counts = torch.stack([total.sum(), kept.sum(), clean.sum(), (kept & clean).sum()])
    if score is None:
        return counts, (
            torch.empty(0, device=keep.device),
            torch.empty(0, dtype=torch.bool, device=keep.device),
        )
    score = score.detach().flatten().float()
    known = ~score.isnan()
    return counts, (score[known], ~clean[known])


def _result(counts: Tensor, score: Tensor, is_noise: Tensor) -> dict[str, float]:
    total, kept, clean, both = (float(c) for c in counts)
    auroc, sd = auroc_with_sd(score, ~is_noise)
    return {
        "precision": _ratio(both, kept),
        "recall": _ratio(both, clean),
        "keep_rate": _ratio(kept, total),
        "f1": _ratio(2 * both, kept + clean),
        "auroc": auroc,
        "auroc_sd": sd,
        "average_precision": average_precision(-score, is_noise),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def auroc_with_sd(score: Tensor, positive: Tensor) -> tuple[float, float]:
    """Area under the ROC curve by mid-ranks (ties count half) and its DeLong standard deviation.

    Args:
        score: ``(N,)`` without NaN; infinities are allowed and rank as such.
        positive: ``(N,)`` bool.

    Returns:
        ``(auroc, sd)``; NaN where a class is empty (for ``sd``: has fewer than two members).
    """
    pos, neg = score[positive], score[~positive]
    n, m = len(pos), len(neg)
    if not n or not m:
        return float("nan"), float("nan")
    overall, own_pos, own_neg = mid_rank(score), mid_rank(pos), mid_rank(neg)
    # for each positive the share of negatives below it, and for each negative of positives above it
    below = (overall[positive] - own_pos) / m
    above = 1 - (overall[~positive] - own_neg) / n
    auroc = float(below.mean())
    if n < 2 or m < 2:
        return auroc, float("nan")
    return auroc, float((below.var() / n + above.var() / m).sqrt())


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Mean precision at the ranks of the positives, highest score first: ``sum (R_n - R_(n-1)) P_n``.

    No interpolation. Equal scores form one step, so their order does not matter; a score that tells nothing
    gives the share of positives.

    Args:
        score: ``(N,)`` without NaN; infinities are allowed and rank as such.
        positive: ``(N,)`` bool.

    Returns:
        In (0, 1]; NaN where there is no positive, or nothing else.
    """
    total = int(positive.sum())
    if not total or total == len(positive):
        return float("nan")
    _, inverse, count = score.unique(return_inverse=True, return_counts=True)
    hits = torch.zeros(len(count), dtype=torch.float64, device=score.device)
    hits.index_add_(0, inverse, positive.double())
    hits, count = hits.flip(0), count.flip(0).double()
    precision = hits.cumsum(dim=0) / count.cumsum(dim=0)
    return float((hits * precision).sum() / total)


def mid_rank(x: Tensor) -> Tensor:
    """``(N,)`` float64 ranks from 1; equal values share the mean of their ranks."""
    _, inverse, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(dim=0).double()
    return (last - (count.double() - 1) / 2)[inverse]


class FilterQuality(Metric):
    """:func:`filter_quality` accumulated over batches and ranks.

    Keeps four counts, and 5 bytes per scored sample for the exact AUROC and average precision.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor
    score: list[Tensor] | Tensor
    noise: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", default=torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("score", default=[], dist_reduce_fx="cat")
        self.add_state("noise", default=[], dist_reduce_fx="cat")

    def update(self, keep: Tensor, is_noise: Tensor, score: Tensor | None = None) -> None:
        """Add samples; arguments as in :func:`filter_quality`."""
        counts, (score, noise) = _reduce(keep, is_noise, score)
        assert isinstance(self.score, list)
        assert isinstance(self.noise, list)
        self.counts += counts
        self.score.append(score)
        self.noise.append(noise.to(torch.uint8))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states; a rank without samples takes part with empty ones of the right dtype."""
        if not len(self.score):
            self.score = [torch.empty(0, device=self.device)]
            self.noise = [torch.empty(0, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, float]:
        """The result of :func:`filter_quality` over all samples."""
        if not len(self.score):
            return _result(self.counts, torch.empty(0), torch.empty(0, dtype=torch.bool))
        score = self.score if isinstance(self.score, Tensor) else torch.cat(self.score)
        noise = self.noise if isinstance(self.noise, Tensor) else torch.cat(self.noise)
        return _result(self.counts, score, noise.bool())
