"""How well a filter tells clean from wrong labels, where the truth is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

NAMES = ("precision", "recall", "keep_rate", "f1", "auroc", "auroc_sd", "average_precision")
#: kinds of wrong labels in multi-label data, by the given value: 0 and 1
KINDS = ("missing", "extra")


def filter_quality(keep: Tensor, is_noise: Tensor, score: Tensor | None = None) -> dict[str, float]:
    """Precision, recall, F1 and keep rate of the kept set, AUROC and average precision of the score.

    Clean is the positive class, but for ``average_precision``, which says how well the *wrong* labels are
    found from the lowest score upwards.

    Args:
        keep: ``(B,)`` bool, or weights of which those >= 1/2 are kept (any shape, e.g. ``(B, L)``).
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
    """``(4,)`` counts of all, kept, clean, clean and kept; and the scores, NaN among them, with noise flags.

    Of fixed shapes, so that a step does not wait for a GPU.
    """
    if keep.shape != is_noise.shape or (score is not None and score.shape != keep.shape):
        shapes = [tuple(keep.shape), tuple(is_noise.shape), None if score is None else tuple(score.shape)]
        raise ValueError(f"keep, is_noise and score must have the same shape, got {shapes}.")
    kept, clean = keep.detach().flatten() >= 0.5, ~is_noise.detach().flatten().bool()
    total = torch.full_like(kept, True)
    counts = torch.stack([total.sum(), kept.sum(), clean.sum(), (kept & clean).sum()])
    if score is None:
        return counts, (
            torch.empty(0, device=keep.device),
            torch.empty(0, dtype=torch.bool, device=keep.device),
        )
    return counts, (score.detach().flatten().float(), ~clean)


def _result(counts: Tensor, score: Tensor, is_noise: Tensor) -> dict[str, float]:
    total, kept, clean, both = (float(c) for c in counts)
    known = ~score.isnan()
    score, is_noise = score[known], is_noise[known]
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

    Keeps four counts, and 5 bytes per sample (or label) for the exact AUROC and average precision.
    With ``num_labels`` it also tells of ``(B, L)`` labels how the two kinds of errors are found, labels that
    are given but wrong (``extra``) and labels that lack (``missing``): ``extra_precision`` = P(wrong | given,
    dropped), ``extra_recall`` = P(dropped | given, wrong), ``extra_auroc``, and the same for ``missing``;
    :meth:`per_label` has them for each label.

    Args:
        num_labels: L; 0 for one class per sample.
        kwargs: see torchmetrics.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor
    label_counts: Tensor
    score: list[Tensor] | Tensor
    noise: list[Tensor] | Tensor

    def __init__(self, num_labels: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_labels = num_labels
        # [missing, extra] x labels x [all, kept, clean, clean and kept]
        empty = torch.zeros(2, num_labels, 4, dtype=torch.int64)
        self.add_state("label_counts", default=empty, dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("score", default=[], dist_reduce_fx="cat")
        self.add_state("noise", default=[], dist_reduce_fx="cat")

    def update(
        self, keep: Tensor, is_noise: Tensor, score: Tensor | None = None, label: Tensor | None = None
    ) -> None:
        """Add samples.

        Args:
            keep, is_noise, score: as in :func:`filter_quality`.
            label: ``(B, L)`` given labels, 0 or 1; needed with ``num_labels``.

        Raises:
            ValueError: if the shapes do not agree.
        """
        counts, (scores, noise) = _reduce(keep, is_noise, score)
        assert isinstance(self.score, list)
        assert isinstance(self.noise, list)
        self.counts += counts
        code = noise.to(torch.uint8)
        if self.num_labels:
            if label is None or label.shape != keep.shape or label.shape[1:] != (self.num_labels,):
                shape = None if label is None else tuple(label.shape)
                raise ValueError(
                    f"FilterQuality(num_labels={self.num_labels}) needs keep, is_noise and label of shape "
                    f"(B, {self.num_labels}), got keep {tuple(keep.shape)} and label {shape}."
                )
            given = label > 0
            self.label_counts += _label_counts(keep >= 0.5, ~is_noise.bool(), given)
            if score is not None:
                code += 2 * given.flatten().to(torch.uint8)
        self.score.append(scores)
        self.noise.append(code)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states; a rank without samples takes part with empty ones of the right dtype."""
        if not len(self.score):
            self.score = [torch.empty(0, device=self.device)]
            self.noise = [torch.empty(0, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, float]:
        """The result of :func:`filter_quality` over all samples, and what ``num_labels`` adds."""
        if not len(self.score):
            score, code = torch.empty(0), torch.empty(0, dtype=torch.uint8)
        else:
            score = self.score if isinstance(self.score, Tensor) else torch.cat(self.score)
            code = self.noise if isinstance(self.noise, Tensor) else torch.cat(self.noise)
        noise = code % 2 > 0
        found = _result(self.counts, score, noise)
        for given, name in enumerate(KINDS if self.num_labels else ()):
            own = (code // 2 == given) & ~score.isnan()
            for key, value in _found(self.label_counts[given].sum(dim=0)).items():
                found[f"{name}_{key}"] = float(value)
            found[f"{name}_auroc"] = auroc_with_sd(score[own], ~noise[own])[0]
        return found

    def per_label(self) -> dict[str, Tensor]:
        """``extra_precision``, ``extra_recall`` and the same for ``missing``: ``(L,)`` float64."""
        return {
            f"{name}_{key}": value
            for given, name in enumerate(KINDS)
            for key, value in _found(self.label_counts[given]).items()
        }


def _label_counts(kept: Tensor, clean: Tensor, given: Tensor) -> Tensor:
    """``(2, L, 4)`` counts of absent and of given labels: all, kept, clean, clean and kept."""
    columns = torch.stack([torch.ones_like(kept), kept, clean, kept & clean], dim=2)
    return torch.stack([(columns & (given == kind).unsqueeze(2)).sum(dim=0) for kind in (False, True)])


def _found(counts: Tensor) -> dict[str, Tensor]:
    """Precision and recall of "dropped = wrong" from counts ``(..., 4)``; NaN where undefined."""
    total, kept, clean, both = counts.double().unbind(dim=-1)
    caught = total - kept - clean + both  # wrong and dropped
    return {"precision": caught / (total - kept), "recall": caught / (total - clean)}
