"""The losses of RCML: ranking of samples by group lasso, discrepancy of two networks by MMD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nrml import distributed
from lightning_nrml.losses.base import full_precision, safe_divide, widen
from lightning_nrml.losses.multilabel import bce_entries, keep_smallest, prepare_entries
from lightning_nrml.precision import exact_products

_EPSILON = 1e-10


@dataclass(frozen=True, slots=True)
class GroupLasso:
    """How far predictions contradict the labels of each sample.

    Args:
        error: ``(B,)`` weighted sum of both kinds; small = the labels look right.
        missing: ``(B, L)``, for each absent label how far it is ranked above present ones.
        extra: ``(B, L)``, for each present label how far it is ranked below absent ones.
        suspect: ``(B,)`` int64, the label that is most likely wrong.
    """

    error: Tensor
    missing: Tensor
    extra: Tensor
    suspect: Tensor


@torch.no_grad()
def group_lasso(
    prob: Tensor, label: Tensor, alpha: float = 0.2, beta: float = 0.8, valid: Tensor | None = None
) -> GroupLasso:
    """RCML's ranking error, without gradient.

    ``d_ij = max(0, 2 (p_i - p_j) + 1)`` for absent i and present j is 0 once the present label leads by .5, 1
    at a tie and 3 at worst. ``missing_i = sqrt(sum_j d_ij^2 + 1e-10)``, ``extra_j = sqrt(sum_i d_ij^2 +
    1e-10)``, ``error = alpha sum_i missing_i + beta sum_j extra_j``. A sample without any label, or with all
    of them, has the smallest error of all.

    Source: Aksoy et al., IEEE TNNLS 2022, arXiv 2012.10715, group lasso module.

    Args:
        prob: ``(B, L)`` probabilities.
        label: ``(B, L)`` given labels, 0 or 1.
        alpha: weight of missing labels.
        beta: weight of extra labels.
        valid: ``(B, L)`` bool, labels that are looked at; default all.
    """
    p = widen(prob)
    known = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
    absent, present = (label < 0.5) & known, (label > 0.5) & known
    lead = (2 * (p[:, :, None] - p[:, None, :]) + 1).clamp(min=0.0)
    square = torch.where(absent[:, :, None] & present[:, None, :], lead, 0.0) ** 2
    missing = (square.sum(dim=2) + _EPSILON).sqrt()
    extra = (square.sum(dim=1) + _EPSILON).sqrt()
    most_missing, most_extra = missing.max(dim=1), extra.max(dim=1)
    suspect = torch.where(most_missing.values > most_extra.values, most_missing.indices, most_extra.indices)
    error = alpha * missing.sum(dim=1) + beta * extra.sum(dim=1)
    return GroupLasso(error, missing, extra, suspect)


@torch.no_grad()
def flip_suspects(first: GroupLasso, second: GroupLasso, label: Tensor, rate: float) -> Tensor:
    """Turn the label that both networks suspect, in the samples that contradict their labels most.

    Of the ``n`` samples (of all ranks) in which both suspect the same label, ``ceil(rate * n)`` with the
    highest mean error are chosen, and this one label is turned in each. Samples that no network finds
    anything wrong with are not among them.

    Source: the flipping module of CCML, version 1 of arXiv 2012.10715.

    Args:
        first, second: of the two networks.
        label: ``(B, L)`` given labels, 0 or 1.
        rate: in [0, 1].

    Returns:
        ``(B, L)`` labels of the same type.
    """
    column = first.suspect.unsqueeze(1)
    nothing = 2 * _EPSILON**0.5
    agreed = first.suspect == second.suspect
    for net in (first, second):
        agreed = agreed & (torch.maximum(net.missing, net.extra).gather(1, column).squeeze(1) > nothing)
    chosen = keep_smallest(-(first.error + second.error) / 2, agreed, rate, upwards=True)
    turned = label.scatter(1, column, 1 - label.gather(1, column))
    return torch.where(chosen.unsqueeze(1), turned, label)


def mmd(x: Tensor, y: Tensor, sigma: float = 10000.0, kept: Tensor | None = None) -> Tensor:
    """Squared maximum mean discrepancy (biased) of two sets of rows, kernel ``exp(-|a - b|^2 / sigma)``.

    In fp32 and, since kernel values near 1 cancel, by ``1 - k``. It saturates at ``2 / n`` with no gradient
    where all distances are far above ``sigma``.

    Args:
        x, y: ``(B, ...)``, flattened to rows.
        sigma: width of the kernel, in squared units.
        kept: ``(B,)`` bool, rows of both that take part; default all.

    Returns:
        0-d tensor; 0 if no row takes part.
    """
    with full_precision(x), exact_products(x.device.type):
        a, b = widen(x).flatten(1), widen(y).flatten(1)
        m = a.new_ones(len(a)) if kept is None else kept.to(a)
        a, b = (r.masked_fill(m[:, None] == 0, 0.0) for r in (a, b))
        # distances do not depend on the origin: keep the numbers small
        shift = safe_divide((a.detach() * m[:, None]).sum(dim=0), m.sum())
        a, b = a - shift, b - shift
        pairs = m[:, None] * m
        count = pairs.sum()

        def mean_gap(first: Tensor, second: Tensor) -> Tensor:
            squares = (first**2).sum(dim=1)[:, None] + (second**2).sum(dim=1) - 2 * first @ second.T
            return safe_divide((-torch.expm1(-squares.clamp(min=0.0) / sigma) * pairs).sum(), count)

        return 2 * mean_gap(a, b) - mean_gap(a, a) - mean_gap(b, b)


def keep_rate(epoch: int, max_epochs: int, start: float, end: float) -> float:
    """Share of a batch that is kept in an epoch, counted from 0; ``end`` in the last tenth of the run.

    ``int(start + e (end - start) / E) / 100`` in per cent, as in the authors' code.

    Args:
        epoch: from 0.
        max_epochs: E.
        start, end: in [0, 1].
    """
    if epoch >= max_epochs - int(0.1 * max_epochs):
        return end
    return int(100 * start + epoch * 100 * (end - start) / max_epochs + 1e-9) / 100


class RCMLLoss(nn.Module):
    """The sum of both networks' losses in robust collaborative multi-label learning.

    Each network ranks the batch (of all ranks) by :func:`group_lasso`; the *other* network is trained on the
    ``int(B * keep_rate)`` samples with the smallest error: BCE summed over labels, mean over these samples.
    To that comes ``consistency_weight * mmd(logits)``, which draws the two outputs together, and
    ``- disparity_weight * mmd(features)``, which drives their early features apart. Each network gets only
    the gradient of its own loss, as if the other one were constant.

    Source: Aksoy, Ravanbakhsh, Demir, "Multi-Label Noise Robust Collaborative Learning for Remote Sensing
    Image Classification", IEEE TNNLS 2022, arXiv 2012.10715; details as in the authors' code.

    Args:
        alpha: weight of missing labels in the ranking.
        beta: weight of extra labels in the ranking.
        disparity_weight: see above; 0 switches it off.
        consistency_weight: see above; 0 switches it off.
        sigma: kernel width of both discrepancies.
        swap: train each network on the samples that the other one chose (else on its own).

    Raises:
        ValueError: a weight is negative or ``sigma`` is not above 0.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        beta: float = 0.8,
        disparity_weight: float = 1.0,
        consistency_weight: float = 0.1,
        sigma: float = 10000.0,
        swap: bool = True,
    ) -> None:
        super().__init__()
        numbers = {"alpha": alpha, "beta": beta}
        numbers |= {"disparity_weight": disparity_weight, "consistency_weight": consistency_weight}
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        if sigma <= 0:
            raise ValueError(f"sigma must be above 0, got {sigma}.")
        self.alpha, self.beta, self.sigma, self.swap = alpha, beta, sigma, swap
        self.disparity_weight, self.consistency_weight = disparity_weight, consistency_weight

    def forward(
        self,
        logits_1: Tensor,
        logits_2: Tensor,
        label: Tensor,
        features_1: Tensor | None = None,
        features_2: Tensor | None = None,
        keep_rate: float = 0.6,
        weight: Tensor | None = None,
        flip_rate: float = 0.0,
    ) -> Tensor:
        """The sum of the two losses; its gradients are those of each network's own loss.

        Args:
            logits_1, logits_2: ``(B, L)``.
            label: ``(B, L)`` given labels, 0 or 1.
            features_1, features_2: ``(B, ...)`` early features; ``None`` = no disparity.
            keep_rate: share of the batch that is kept, in [0, 1].
            weight: ``(B, L)`` or ``(B,)`` in [0, 1]; labels of weight 0 count neither in the ranking nor in
                the loss, and samples that have no others are left out altogether.
            flip_rate: share in [0, 1] of the samples with a common suspect in which this label is turned, see
                :func:`flip_suspects`; ranking and BCE are those of the turned labels. 0 = the method as
                published in the journal.
        """
        options = {"keep_rate": keep_rate, "weight": weight, "flip_rate": flip_rate}
        return self.terms(logits_1, logits_2, label, features_1, features_2, **options)["loss"]  # type: ignore[arg-type]

    def terms(
        self,
        logits_1: Tensor,
        logits_2: Tensor,
        label: Tensor,
        features_1: Tensor | None = None,
        features_2: Tensor | None = None,
        keep_rate: float = 0.6,
        weight: Tensor | None = None,
        flip_rate: float = 0.0,
    ) -> dict[str, Tensor]:
        """``loss`` of :meth:`forward` and its parts without gradient.

        ``loss_1``, ``loss_2``, ``consistency``, ``disparity`` (weighted), and ``(B,)`` bool ``kept_1``,
        ``kept_2``, the samples that each network was trained on, and ``flipped``, the number of labels that
        were turned (of this rank).
        """
        with full_precision(logits_1):
            z1, y, w = prepare_entries(logits_1, label, weight)
            z2, _, _ = prepare_entries(logits_2, label, weight)
            row = (w > 0).any(dim=1)
            given = y
            if flip_rate:
                y = flip_suspects(self._ranked(z1, y, w), self._ranked(z2, y, w), y, flip_rate)
            chosen = [self._chosen(z, y, w, row, keep_rate) for z in (z1, z2)]
            kept_2, kept_1 = chosen if self.swap else chosen[::-1]
            bce_1, bce_2 = (_kept_bce(z, y, w, k) for z, k in ((z1, kept_1), (z2, kept_2)))
            consistency = self._discrepancy(self.consistency_weight, z1, z2, row)
            disparity = self._discrepancy(self.disparity_weight, features_1, features_2, row)
            common = consistency - disparity
            # one discrepancy gives each network's share of its gradient; as a value it is in both losses
            total = bce_1 + bce_2 + common + common.detach()
            return {
                "loss": total,
                "loss_1": (bce_1 + common).detach(),
                "loss_2": (bce_2 + common).detach(),
                "consistency": consistency.detach(),
                "disparity": disparity.detach(),
                "kept_1": kept_1,
                "kept_2": kept_2,
                "flipped": (y != given).sum(),
            }

    def _chosen(self, z: Tensor, label: Tensor, weight: Tensor, row: Tensor, rate: float) -> Tensor:
        """``(B,)`` bool, the samples that the network of these logits trusts."""
        return keep_smallest(self._ranked(z, label, weight).error, row, rate)

    def _ranked(self, z: Tensor, label: Tensor, weight: Tensor) -> GroupLasso:
        return group_lasso(z.detach().sigmoid(), label, self.alpha, self.beta, weight > 0)

    def _discrepancy(self, factor: float, x: Tensor | None, y: Tensor | None, row: Tensor) -> Tensor:
        """Weighted MMD over the rows of all ranks; every rank computes the whole."""
        if factor == 0 or x is None or y is None:
            return torch.zeros((), device=row.device)
        x, y = (distributed.gather(v.flatten(1), grad=True) for v in (x, y))
        return factor * mmd(x, y, self.sigma, distributed.gather(row))


def _kept_bce(z: Tensor, label: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """BCE summed over labels, (weighted) mean over the kept samples of all ranks."""
    w = weight * kept[:, None]
    total = distributed.mean_over_ranks(w.sum())
    return safe_divide((bce_entries(z, label) * w).sum() * z.shape[1], total)
