"""What the multi-label losses share, and the two without a memory: binary cross-entropy and asymmetric."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.losses.base import full_precision, safe_divide, widen
from lightning_nrml.state import StateModule


class MultiLabelLoss(StateModule):
    """Base class of the losses on ``(B, L)`` logits of one network.

    Rules that every subclass keeps: the maths is in fp32 (or wider) whatever the input and autocast; the
    value is the weighted mean over all entries of all ranks, so that DDP's mean of values and gradients
    equals one process on the whole batch (all ranks give equally many rows); an entry of weight 0 takes no
    part and gets exactly zero gradient, even if it holds NaN; a batch in which nothing is kept gives 0,
    attached to the graph.

    Attributes:
        num_samples: rows of the loss's memory; 0 = it has none, or not yet (see :meth:`allocate`).
    """

    num_samples: int = 0

    def forward(
        self, logits: Tensor, label: Tensor, index: Tensor, weight: Tensor | None = None, epoch: int = 0
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: ``(B, L)`` of any float type.
            label: ``(B, L)`` given labels, 0 or 1.
            index: ``(B,)`` int64 positions in the training set, for losses that remember samples.
            weight: ``(B, L)`` or ``(B,)`` weights in [0, 1]; ``None`` = all 1.
            epoch: from 0, for losses with a warm-up.

        Returns:
            0-d tensor, float32 (float64 for float64 input).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(logits, label, index, ...).")

    def allocate(self, num_samples: int) -> None:
        """Make room for a training set of this size; nothing to do for losses without a memory."""


class MultiLabelBCELoss(MultiLabelLoss):
    """Binary cross-entropy, mean over entries: no defence against noise."""

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        index: Tensor | None = None,
        weight: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """See :meth:`MultiLabelLoss.forward`; ``index`` and ``epoch`` are not used."""
        with full_precision(logits):
            z, y, w = prepare_entries(logits, label, weight)
            return entry_mean(bce_entries(z, y), w)


class MultiLabelASLLoss(MultiLabelLoss):
    """Asymmetric loss: easy negatives count less than positives, very easy ones not at all.

    Per entry ``-(1 - q)^gamma log q`` with ``q = p`` for a positive and ``q = min(1 - p + clip, 1)`` for a
    negative. Equal to timm's ``AsymmetricLossMultiLabel`` but for the mean over entries (timm
    sums over labels at least) and the weights.

    Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, arXiv 2009.14119,
    eq. 7.

    Args:
        gamma_neg: focusing exponent of negatives, not negative.
        gamma_pos: focusing exponent of positives, not negative.
        clip: probability below which a negative costs nothing, in [0, 1).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05) -> None:
        super().__init__()
        if gamma_neg < 0 or gamma_pos < 0:
            raise ValueError(f"gamma_neg ({gamma_neg}) and gamma_pos ({gamma_pos}) must not be negative.")
        if not 0 <= clip < 1:
            raise ValueError(f"clip must lie in [0, 1), got {clip}.")
        self.gamma_neg, self.gamma_pos, self.clip = gamma_neg, gamma_pos, clip

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        index: Tensor | None = None,
        weight: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """See :meth:`MultiLabelLoss.forward`; ``index`` and ``epoch`` are not used."""
        with full_precision(logits):
            z, y, w = prepare_entries(logits, label, weight)
            p = z.sigmoid()
            right = torch.where(y > 0.5, p, (1 - p + self.clip).clamp(max=1.0))
            gamma = torch.full_like(right, self.gamma_neg).masked_fill_(y > 0.5, self.gamma_pos)
            # at 0 the slope of the power is infinite below gamma = 1, but its product with the log is 0
            wrong = (1 - right).clamp(min=torch.finfo(right.dtype).tiny)
            return entry_mean(-(wrong**gamma) * right.clamp(min=1e-8).log(), w)


def prepare_entries(logits: Tensor, label: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Check a batch, widen it and blank the dropped entries, so that nothing in them can reach the loss.

    Returns:
        ``(B, L)`` logits whose dropped entries are 0 and pass no gradient back, labels, and weights, all of
        one float type (weights 1 everywhere without any; NaN counts as 0).

    Raises:
        ValueError: if the shapes do not agree.
    """
    if logits.ndim != 2 or label.shape != logits.shape:
        raise ValueError(
            f"'logits' and 'label' must both be (B, L), got {tuple(logits.shape)} and {tuple(label.shape)}."
        )
    z = widen(logits)
    if weight is None:
        return z, label.to(z), torch.ones_like(z)
    if weight.shape not in (z.shape, z.shape[:1]):
        raise ValueError(
            f"'weight' must be {tuple(z.shape)} or ({len(z)},) as 'logits' are, got {tuple(weight.shape)}."
        )
    w = weight.detach().to(z)
    w = (w if w.ndim == 2 else w[:, None]).expand_as(z)
    dropped = ~(w > 0)
    return z.masked_fill(dropped, 0.0), label.to(z).masked_fill(dropped, 0.0), w.masked_fill(dropped, 0.0)


def entry_mean(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the entries of all ranks, as this rank's share of it."""
    return safe_divide((value * weight).sum(), distributed.mean_over_ranks(weight.sum()))


def bce_entries(logits: Tensor, target: Tensor) -> Tensor:
    """``(B, L)`` binary cross-entropies against targets in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


@torch.no_grad()
def keep_smallest(value: Tensor, valid: Tensor, rate: float, upwards: bool = False) -> Tensor:
    """Which values are among the smallest over all ranks; of equal ones the first.

    Args:
        value: ``(M,)`` of this rank; all ranks give equally many.
        valid: ``(M,)`` bool, those that may be chosen.
        rate: share in [0, 1] of the valid values of all ranks; ``int(rate * n)`` are kept, at least one.
        upwards: keep ``ceil(rate * n)`` instead, which may be none.

    Returns:
        ``(M,)`` bool.
    """
    values, allowed = distributed.gather(value), distributed.gather(valid)
    order = torch.where(allowed, values, torch.inf).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    share = rate * allowed.sum().double()
    # the small number mends (1 - .9) * 10 = .99...
    count = (share - 1e-9).ceil() if upwards else (share + 1e-9).floor().clamp(min=1)
    start = distributed.rank() * len(value)
    return (place < count)[start : start + len(value)] & valid
