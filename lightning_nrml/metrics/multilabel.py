"""Average precision, F1 and calibration of multi-label classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_nrml.metrics.retrieval import _cat, _first_of_each

#: entries of ``MultiLabelMetrics.compute`` with one value per label
PER_CLASS = ("ap", "f1", "f1_tuned", "calibration", "prevalence")


def multilabel_metrics(
    prob: Tensor, target: Tensor, threshold: float = 0.5, class_threshold: Tensor | None = None
) -> dict[str, Any]:
    """Metrics of a whole split at once.

    A label that no row has (an absent class) has no AP and no F1: NaN in the per-class vectors, left out of
    the macro means, and counted in ``num_absent``. scikit-learn and torchmetrics let it count as 0. False
    positives of absent classes still count in the micro values. A probability at the threshold counts as
    present.

    Args:
        prob: ``(N, L)`` probabilities in [0, 1].
        target: ``(N, L)`` right labels, 0 or 1.
        threshold: for ``f1_macro`` and ``f1_micro``.
        class_threshold: ``(L,)`` for ``f1_macro_tuned`` and ``f1_micro_tuned``, which are left out without.
            Thresholds that were tuned on the same rows flatter.

    Returns:
        Floats: ``map_macro`` (mean of the per-class AP), ``map_micro`` (all entries pooled, so it sees shifts
        of scores between classes), ``f1_macro``, ``f1_micro``, the tuned ones, ``calibration_gap`` (mean
        probability - prevalence, over all entries: above 0 after additive noise, below 0 after subtractive),
        ``calibration_gap_abs`` (mean over classes of its size), ``num_samples``, ``num_absent``. Tensors
        ``(L,)`` float64: ``ap``, ``f1``, ``f1_tuned``, ``calibration`` (signed gap), ``prevalence``.

    Raises:
        ValueError: the shapes differ, a probability is NaN or outside [0, 1], or a label is not 0 or 1.
    """
    _check_shapes(prob, target)
    _check_values(prob, target)
    positive = target.bool()
    absent = ~positive.any(dim=0)
    ap = average_precision(prob, positive)
    f1, f1_micro = _f1(prob >= threshold, positive)
    prevalence = positive.double().mean(dim=0)
    calibration = prob.double().mean(dim=0) - prevalence
    result: dict[str, Any] = {
        "map_macro": _present_mean(ap),
        "map_micro": float(average_precision(prob.reshape(-1, 1), positive.reshape(-1, 1))),
        "f1_macro": _present_mean(f1),
        "f1_micro": f1_micro,
        "calibration_gap": float(calibration.mean()),
        "calibration_gap_abs": float(calibration.abs().mean()),
        "num_samples": float(len(prob)),
        "num_absent": float(absent.sum()),
        "ap": ap,
        "f1": f1,
        "calibration": calibration,
        "prevalence": prevalence,
    }
    if class_threshold is not None:
        f1_tuned, f1_micro = _f1(prob >= class_threshold.to(prob), positive)
        result |= {
            "f1_macro_tuned": _present_mean(f1_tuned),
            "f1_micro_tuned": f1_micro,
            "f1_tuned": f1_tuned,
        }
    return result


def average_precision(score: Tensor, target: Tensor) -> Tensor:
    """Average precision of each column, as scikit-learn's: equal scores share one threshold.

    ``AP = sum_n (R_n - R_{n-1}) P_n`` over the distinct scores in falling order.

    Args:
        score: ``(N, L)``, higher = rather present; any order-preserving scale.
        target: ``(N, L)`` bool.

    Returns:
        ``(L,)`` float64, NaN for a column without positives.
    """
    _, hits, last = _ranked(score, target)
    rank = torch.arange(1, len(score) + 1, dtype=torch.float64, device=score.device)[:, None]
    ends = torch.where(last, hits, 0.0)
    before = torch.cat([torch.zeros_like(ends[:1]), ends.cummax(dim=0).values[:-1]]) if len(ends) else ends
    total = torch.where(last, (hits - before) * hits / rank, 0.0).sum(dim=0)
    return total / target.sum(dim=0)  # 0 / 0 is NaN


def best_thresholds(prob: Tensor, target: Tensor, default: float = 0.5) -> Tensor:
    """For each column the threshold with the highest F1; of equal ones the highest.

    Use on a validation split, and apply to the test split.

    Args:
        prob: ``(N, L)`` probabilities.
        target: ``(N, L)`` 0 or 1.
        default: for columns without positives.

    Returns:
        ``(L,)`` float32 (float64 for float64 input): the lowest probability that counts as present.
    """
    positive = target.bool()
    dtype = torch.promote_types(prob.dtype, torch.float32)  # rounded up, a threshold would miss its own row
    if not len(prob):
        return torch.full(prob.shape[1:], default, dtype=dtype, device=prob.device)
    score, hits, last = _ranked(prob, positive)
    rank = torch.arange(1, len(prob) + 1, dtype=torch.float64, device=prob.device)[:, None]
    f1 = torch.where(last, 2 * hits / (rank + positive.sum(dim=0)), -1.0)
    # argmax may return any of several equal entries
    first = torch.where(f1 == f1.amax(dim=0), rank, float(len(prob) + 1)).amin(dim=0).long() - 1
    best = score.gather(0, first[None])[0].to(dtype)
    return torch.where(positive.any(dim=0), best, default)


def _ranked(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores falling, true positives down to each row (float64), and the last row of each score."""
    score, order = score.sort(dim=0, descending=True)
    hits = target.gather(0, order).double().cumsum(dim=0)
    last = torch.ones_like(score, dtype=torch.bool)
    last[:-1] = score[:-1] != score[1:]
    return score, hits, last


def _f1(predicted: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """F1 of each column (NaN without positives) and of all entries pooled."""
    both = (predicted & target).sum(dim=0).double()
    sizes = predicted.sum(dim=0) + target.sum(dim=0)
    f1 = torch.where(target.any(dim=0), 2 * both / sizes, torch.nan)
    pooled = float(2 * both.sum() / sizes.sum()) if bool(target.any()) else float("nan")
    return f1, pooled


def _present_mean(value: Tensor) -> float:
    """Mean over classes that have a value; NaN if none has."""
    return float(value[~value.isnan()].mean())


def _check_shapes(prob: Tensor, target: Tensor) -> None:
    if prob.ndim != 2 or prob.shape != target.shape:
        raise ValueError(
            f"'prob' and 'target' must both be (N, L), got {tuple(prob.shape)} and {tuple(target.shape)}."
        )


def _check_values(prob: Tensor, target: Tensor) -> None:
    bad = ~((prob >= 0) & (prob <= 1))
    if bool(bad.any()):
        row, label = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"'prob' of row {row}, label {label} is {float(prob[row, label])} ({int(bad.sum())} such); "
            "probabilities in [0, 1] are accepted: apply a sigmoid to logits."
        )
    bad = (target != 0) & (target != 1)
    if bool(bad.any()):
        row, label = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"'target' of row {row}, label {label} is {float(target[row, label])}; 0 and 1 are accepted."
        )


class MultiLabelMetrics(Metric):
    """:func:`multilabel_metrics` accumulated over batches and ranks, exactly: 5 bytes per entry are kept.

    Every rank computes the result from the rows of all ranks; the mean of per-rank values would be another
    number. Pass ``index`` (positions in the evaluated split) when a distributed sampler may repeat rows: each
    index then counts once.

    Args:
        num_labels: L.
        threshold: for ``f1_macro`` and ``f1_micro``.
        class_threshold: ``(L,)`` thresholds, for the tuned F1.
        **kwargs: further arguments of :class:`torchmetrics.Metric` (``compute_on_cpu``, ...).

    Raises:
        ValueError: ``num_labels`` is below 1, or ``class_threshold`` has another length.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    prob: list[Tensor] | Tensor
    target: list[Tensor] | Tensor
    index: list[Tensor] | Tensor

    def __init__(
        self,
        num_labels: int,
        threshold: float = 0.5,
        class_threshold: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
        if class_threshold is not None and class_threshold.shape != (num_labels,):
            raise ValueError(
                f"class_threshold must have shape ({num_labels},), got {tuple(class_threshold.shape)}."
            )
        self.num_labels = num_labels
        self.threshold = threshold
        self.class_threshold = class_threshold
        # flattened: a rank without rows gathers an empty vector
        self.add_state("prob", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")
        self.add_state("index", default=[], dist_reduce_fx="cat")

    def update(self, prob: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Add rows.

        Args:
            prob: ``(B, L)`` probabilities of any floating dtype; kept in float32.
            target: ``(B, L)`` right labels, 0 or 1.
            index: ``(B,)`` integer positions in the evaluated split; ``None`` = all rows are distinct.
        """
        _check_shapes(prob, target)
        if prob.shape[1] != self.num_labels:
            raise ValueError(f"'prob' has {prob.shape[1]} labels, but num_labels is {self.num_labels}.")
        if index is not None and index.shape != prob.shape[:1]:
            raise ValueError(f"'index' must have shape ({len(prob)},), got {tuple(index.shape)}.")
        _check_values(prob, target)
        if index is None:
            index = torch.full((len(prob),), -1, dtype=torch.int64, device=prob.device)
        assert isinstance(self.prob, list)
        assert isinstance(self.target, list)
        assert isinstance(self.index, list)
        self.prob.append(prob.detach().float().flatten())
        self.target.append(target.detach().to(torch.uint8).flatten())
        self.index.append(index.detach().long())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states; a rank without rows takes part with empty ones of the right dtype."""
        if not len(self.index):
            self.prob = [torch.empty(0, device=self.device)]
            self.target = [torch.empty(0, dtype=torch.uint8, device=self.device)]
            self.index = [torch.empty(0, dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def rows(self) -> tuple[Tensor, Tensor]:
        """``(prob (N, L), target (N, L))`` so far; of rows with one index, the first."""
        prob = _cat(self.prob, torch.float32).view(-1, self.num_labels)
        target = _cat(self.target, torch.uint8).view(-1, self.num_labels)
        keep = _first_of_each(_cat(self.index, torch.int64))
        return (prob, target) if keep is None else (prob[keep], target[keep])

    def compute(self) -> dict[str, Any]:
        """The result of :func:`multilabel_metrics` over all rows, and ``best_threshold`` ``(L,)``.

        ``best_threshold`` is what :func:`best_thresholds` finds on these rows: hand those of the validation
        split to the test split as ``class_threshold``.
        """
        prob, target = self.rows()
        result = multilabel_metrics(prob, target, self.threshold, self.class_threshold)
        return {**result, "best_threshold": best_thresholds(prob, target, self.threshold)}
