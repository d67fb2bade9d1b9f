"""The joint loss of JoCoR for multi-label data."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_nrml.losses.base import full_precision
from lightning_nrml.losses.multilabel import bce_entries, entry_mean, keep_smallest, prepare_entries

Choice = Literal["sample", "entry"]


class MultiLabelJoCoRLoss(nn.Module):
    """One loss for two networks; what both fit and agree upon is kept as clean.

    Per entry ``(1 - co_lambda)(BCE_1 + BCE_2) + co_lambda J`` with the symmetric divergence of two Bernoulli
    laws in closed form, ``J = (p1 - p2)(z1 - z2)``. ``choose="sample"`` keeps the samples with the smallest
    mean over labels; ``"entry"`` keeps single entries: it can drop one wrong label and keep the rest of the
    image, but drops mostly rare positives. The smallest are taken over the batches of all ranks. The loss is
    the mean over what is kept; gradients flow into both networks.

    The forget rate rises linearly from 0 in epoch 0 to ``forget_rate ** exponent`` in epoch
    ``ramp_epochs - 1`` and is ``forget_rate`` from then on. It is the share of wrong *samples* or *entries*,
    by ``choose``: 40 % subtractive noise on UC Merced makes 7.7 % of the entries wrong.

    Source: Wei et al., "Combating Noisy Labels by Agreement: A Joint Training Method with Co-Regularization",
    CVPR 2020, arXiv 2003.02752, eq. 1-4; multi-label form ours.

    Args:
        co_lambda: weight of the agreement, in [0, 1].
        forget_rate: final share that is dropped, in [0, 1).
        ramp_epochs: epochs of the rise, at least 1.
        exponent: see above, above 0.
        choose: ``"sample"`` or ``"entry"``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        co_lambda: float = 0.1,
        forget_rate: float = 0.2,
        ramp_epochs: int = 10,
        exponent: float = 1.0,
        choose: Choice = "sample",
    ) -> None:
        super().__init__()
        if not 0 <= co_lambda <= 1 or not 0 <= forget_rate < 1:
            raise ValueError(
                f"co_lambda ({co_lambda}) must lie in [0, 1], and forget_rate ({forget_rate}) in [0, 1)."
            )
        if ramp_epochs < 1 or exponent <= 0:
            raise ValueError(f"ramp_epochs ({ramp_epochs}) must be 1 or more, exponent ({exponent}) above 0.")
        if choose not in ("sample", "entry"):
            raise ValueError(f"choose is '{choose}': accepted are 'sample' and 'entry'.")
        self.co_lambda, self.forget_rate, self.choose = co_lambda, forget_rate, choose
        self.ramp_epochs, self.exponent = ramp_epochs, exponent

    def rate(self, epoch: int) -> float:
        """The forget rate of an epoch, counted from 0."""
        if epoch >= self.ramp_epochs:
            return self.forget_rate
        share = epoch / max(self.ramp_epochs - 1, 1)
        return float(share * self.forget_rate**self.exponent)

    def forward(
        self,
        logits_1: Tensor,
        logits_2: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        forget_rate: float | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits_1, logits_2: ``(B, L)`` of the two networks.
            label: ``(B, L)`` given labels, 0 or 1.
            weight: ``(B, L)`` or ``(B,)`` in [0, 1]; what has weight 0 takes no part in the choice either.
            forget_rate: share to drop now (see :meth:`rate`); default: the final one.

        Returns:
            0-d tensor, float32 (float64 for float64 input).
        """
        return self.terms(logits_1, logits_2, label, weight, forget_rate)[0]

    def terms(
        self,
        logits_1: Tensor,
        logits_2: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        forget_rate: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and ``(B, L)`` bool, which entries it kept."""
        with full_precision(logits_1):
            z1, y, w = prepare_entries(logits_1, label, weight)
            z2, _, _ = prepare_entries(logits_2, label, weight)
            divergence = (z1.sigmoid() - z2.sigmoid()) * (z1 - z2)
            cost = (1 - self.co_lambda) * (bce_entries(z1, y) + bce_entries(z2, y))
            cost = cost + self.co_lambda * divergence
            kept = self._kept(
                cost.detach(), w, 1 - (self.forget_rate if forget_rate is None else forget_rate)
            )
            return entry_mean(cost, w * kept), kept

    def _kept(self, cost: Tensor, weight: Tensor, rate: float) -> Tensor:
        if self.choose == "entry":
            return keep_smallest(cost.flatten(), weight.flatten() > 0, rate).view_as(cost)
        total = weight.sum(dim=1)
        mean = (cost * weight).sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
        return (keep_smallest(mean, total > 0, rate)[:, None] & (weight > 0)).expand_as(cost)
