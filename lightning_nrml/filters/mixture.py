"""Two groups in a running histogram: which values are low, and how many."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.state import StateModule

_MIN_SHARE, _MAX_SHARE = 0.02, 0.7
_START = 0.7  # means -0.7 and 0.7, deviation 0.7: about the two halves of standardised values
_MIN_DEVIATION = 0.05
_BARELY = 0.01  # log-odds above even
_MIN_DISTANCE = 0.25  # of the means, in deviations


class TwoGroups(StateModule):
    """Mixture of two normal distributions of equal width, fitted to one value per sample.

    The values are kept as a histogram, which changes by as many counts as samples are judged anew, so a step
    costs the same for every size of the training set. Equal widths make the probability of the high group
    rise with the value everywhere. The fit is expectation maximisation, one round per step: it follows values
    that drift, and a split that starts as a guess has time to come true, since what it drops no longer
    teaches the net. Means that want to be closer than a quarter of the deviation are held apart at that
    distance, with a low share of one half at most: equal means would never part again. Unless the caller
    insists on two groups, all values are then taken for high, the lowest ones just so.

    Args:
        limit: values are clipped to ``[-limit, limit]``.
        bins: histogram bins.

    Attributes:
        counts: ``(bins,)`` int64. mean: ``(2,)`` float64, low and high group. deviation: 0-d float64.
        share: 0-d float64, share of the low group (the noise rate, if low means noisy).
        apart: 0-d bool, whether there are two groups.
    """

    counts: Tensor
    mean: Tensor
    deviation: Tensor
    share: Tensor
    apart: Tensor
    middle: Tensor

    def __init__(self, limit: float = 3.0, bins: int = 256) -> None:
        super().__init__()
        self.limit, self.bins = limit, bins
        width = 2 * limit / bins
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("mean", torch.tensor([-_START, _START], dtype=torch.float64))
        self.register_buffer("deviation", torch.tensor(_START, dtype=torch.float64))
        self.register_buffer("share", torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("apart", torch.tensor(True))
        middle = torch.arange(bins, dtype=torch.float64) * width - limit + width / 2
        self.register_buffer("middle", middle, persistent=False)

    def replace(self, old: Tensor, new: Tensor, count: Tensor) -> None:
        """Move the counted ones ``(B,)`` bool of the values from ``old`` to ``new`` (NaN = not there)."""
        for value, sign in ((old, -1), (new, 1)):
            there = count & ~value.isnan()
            place = (value.nan_to_num(0.0) + self.limit) * (self.bins / (2 * self.limit))
            place = place.long().clamp_(0, self.bins - 1)
            self.counts.index_add_(0, place, there.long() * sign)

    def fit(self, restart: Tensor, insist: Tensor | None = None) -> None:
        """One round of expectation maximisation, from where the last one ended.

        Args:
            restart: 0-d bool, go back to the start values: a fit that followed the first few values may have
                lost one group for good.
            insist: 0-d bool, there are two groups, however close they are.
        """
        weight = self.counts.double()
        total = weight.sum().clamp_min(1)
        high = self._odds(self.middle).sigmoid()
        mass = torch.stack([weight * (1 - high), weight * high])
        size = mass.sum(dim=1)
        mean = torch.where(size > 0, (mass @ self.middle) / size.clamp_min(1e-9), self.mean)
        spread = (mass * (self.middle - mean.unsqueeze(1)) ** 2).sum() / total
        deviation = spread.sqrt().clamp_min(_MIN_DEVIATION)
        share = (size[0] / total).clamp(_MIN_SHARE, _MAX_SHARE)
        apart = mean[1] - mean[0] >= _MIN_DISTANCE * deviation
        half = deviation * mean.new_tensor([-0.5, 0.5]) * _MIN_DISTANCE
        mean = torch.where(apart, mean, mean.mean() + half)
        share = torch.where(apart, share, share.clamp_max(0.5))
        start = self.mean.new_tensor([-_START, _START])
        self.mean.copy_(torch.where(restart, start, mean))
        self.deviation.copy_(torch.where(restart, _START, deviation))
        self.share.copy_(torch.where(restart, 0.5, share))
        self.apart.copy_(apart | restart | (False if insist is None else insist))

    def _odds(self, value: Tensor) -> Tensor:
        low, high = self.mean.unbind()
        slope = (high - low) / self.deviation**2
        prior = torch.log1p(-self.share) - self.share.log()
        return slope * (value.double().clamp(-self.limit, self.limit) - (low + high) / 2) + prior

    def log_odds(self, value: Tensor) -> Tensor:
        """``log(P(high) / P(low))`` of values of any shape, in float64; NaN stays NaN."""
        odds = self._odds(value)
        least = self._odds(self.mean.new_tensor(-self.limit)) - _BARELY
        return torch.where(self.apart, odds, odds - least)

    def low_share(self) -> Tensor:
        """Share of the low group, 0-d float64; 0 if there are no two groups."""
        return torch.where(self.apart, self.share, 0.0)
