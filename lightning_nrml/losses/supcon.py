"""Supervised contrastive loss."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.losses.base import Loss, full_precision, prepare, safe_divide, unit_rows

EmptyPositive = Literal["zero", "drop"]


class SupConLoss(Loss):
    """Supervised contrastive loss, "out" form: each sample against all others of the (gathered) batch.

    With ``S = cos / temperature``, ``P(i)`` the other samples of the anchor's class and ``A(i)`` all others:
    ``L_i = log sum_{a in A(i)} exp S_ia - mean_{p in P(i)} S_ip``; the loss is the mean of ``L_i``.
    Several views of a batch are passed as further rows with the same labels.

    Weights edit everything: an anchor counts ``w_i`` in the mean, a positive ``w_p`` in the mean over
    ``P(i)``, and any other sample ``w_a`` in the sum over ``A(i)``. So 0/1 weights give the loss of the
    kept samples alone, and scaling all weights leaves the gradient as it is.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362, eq. 2.

    Args:
        temperature: > 0.
        base_temperature: the loss is multiplied by ``temperature / base_temperature``; ``None`` = factor
            1. The official code uses 0.07, which only rescales the learning rate.
        empty_positive: an anchor without a positive contributes 0 and is counted in the mean
            (``"zero"``, official code) or is left out of it (``"drop"``, pytorch-metric-learning).

    Raises:
        ValueError: if a temperature is not positive or ``empty_positive`` is unknown.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        base_temperature: float | None = None,
        empty_positive: EmptyPositive = "zero",
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
            if value is not None and value <= 0:
                raise ValueError(f"'{name}' must be positive, got {value}.")
        if empty_positive not in get_args(EmptyPositive):
            raise ValueError(f"'empty_positive' must be 'zero' or 'drop', got {empty_positive!r}.")
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.factor = 1.0 if base_temperature is None else temperature / base_temperature
        self.empty_positive = empty_positive

    def forward(self, embedding: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """See :class:`~lightning_nrml.losses.base.Loss`."""
        with full_precision(embedding):
            z, w = prepare(embedding, label, weight)
            z = unit_rows(z)
            keys = distributed.gather(z, grad=True)
            key_label = distributed.gather(label)
            key_weight = distributed.gather(w)

            s = z @ keys.T / self.temperature
            own = torch.arange(len(z), device=z.device) + distributed.rank() * len(z)
            other = key_weight.expand_as(s).scatter(1, own[:, None], 0.0)
            positive = torch.where(label[:, None] == key_label[None, :], other, 0.0)
            num_positive = positive.sum(dim=1)

            # A finite floor instead of -inf: an anchor with no other sample then has a finite gradient.
            floor = torch.finfo(s.dtype).min / 2
            log_sum = (s + other.log()).masked_fill(other == 0, floor).logsumexp(dim=1)
            mean_positive = safe_divide((positive * s).sum(dim=1), num_positive)
            has_positive = num_positive > 0
            per_anchor = torch.where(has_positive, log_sum - mean_positive, 0.0)

            counted = w if self.empty_positive == "zero" else w * has_positive
            total = self.factor * (w * per_anchor).sum()
            return safe_divide(total, distributed.mean_over_ranks(counted.sum()))

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"temperature={self.temperature}, empty_positive={self.empty_positive!r}"
