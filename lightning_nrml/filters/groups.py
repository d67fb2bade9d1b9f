"""Which values are low, and how many: against values that are low for sure, and against the own class."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.state import StateModule

_MAX_SHARE = 0.7
_QUANTILES = (0.1, 0.4)  # of the low values; further out there are few, further in high ones mix in
_SEARCH = (0.75, 1.5)  # times the share: where the valley between the groups is looked for
_DEPTH = 0.75  # of the lower one of the heights on both sides of a valley: above that it is none
_KERNEL = 0.15  # deviation of the kernel that smooths the histogram


class Histogram(StateModule):
    """One value per sample as a running histogram: a step costs the same for every number of samples.

    Args:
        limit: values are clipped to ``[-limit, limit]``.
        bins: histogram bins.

    Attributes:
        counts: ``(bins,)`` int64.
    """

    counts: Tensor
    middle: Tensor
    kernel: Tensor

    def __init__(self, limit: float = 3.0, bins: int = 256) -> None:
        super().__init__()
        self.limit, self.bins = limit, bins
        width = 2 * limit / bins
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))
        middle = torch.arange(bins, dtype=torch.float64) * width - limit + width / 2
        self.register_buffer("middle", middle, persistent=False)
        kernel = torch.exp(-0.5 * ((middle[:, None] - middle) / _KERNEL) ** 2)
        self.register_buffer("kernel", kernel / kernel.sum(dim=0), persistent=False)

    def replace(self, old: Tensor, new: Tensor, count: Tensor) -> None:
        """Move the counted ones ``(B,)`` bool of the values from ``old`` to ``new`` (NaN = not there)."""
        for value, sign in ((old, -1), (new, 1)):
            there = count & ~value.isnan()
            self.counts.index_add_(0, _bin(value, self.limit, self.bins), there.long() * sign)

    def below(self) -> Tensor:
        """``(bins,)`` float64, the share of all values in each bin and those under it."""
        total = self.counts.double().cumsum(0)
        return total / total[-1:].clamp_min(1)

    def mean(self) -> Tensor:
        """0-d float64."""
        return (self.counts.double() * self.middle).sum() / self.counts.sum().clamp_min(1)

    def variance(self) -> Tensor:
        """0-d float64."""
        spread = self.counts.double() * (self.middle - self.mean()) ** 2
        return spread.sum() / self.counts.sum().clamp_min(1)

    def valley(self, least: Tensor, most: Tensor) -> Tensor:
        """Where fewest values lie, between two values (0-d), if many more lie on both sides, or NaN."""
        density = self.kernel @ self.counts.double()
        inside = (self.middle >= least) & (self.middle <= most)
        place = torch.where(inside, density, torch.inf).argmin()
        deepest = self.middle.take(place)  # an index in brackets would make the host wait for it
        left = self.middle < deepest
        height = torch.minimum(torch.where(left, density, 0.0).max(), torch.where(left, 0.0, density).max())
        found = inside.any() & (density.take(place) < _DEPTH * height)
        return torch.where(found, deepest, torch.nan)

    def quantile(self, share: Tensor) -> Tensor:
        """The value under which this share (0-d) of all values lies, 0-d; ``-limit`` without values."""
        total = self.counts.double().cumsum(0)
        target = (share * total[-1]).unsqueeze(0)
        place = torch.searchsorted(total, target).clamp_max(self.bins - 1)
        before = torch.where(place > 0, total[(place - 1).clamp_min(0)], 0.0)
        part = ((target - before) / self.counts[place].clamp_min(1)).clamp(0, 1)
        width = 2 * self.limit / self.bins
        return (self.middle[place] + (part - 0.5) * width).squeeze(0)


def _bin(value: Tensor, limit: float, bins: int) -> Tensor:
    place = (value.nan_to_num(0.0) + limit) * (bins / (2 * limit))
    return place.long().clamp_(0, bins - 1)


class TwoGroups(StateModule):
    """A low group among the values, known by a sample of values that are low for sure.

    The share of the low group is what the low end of the values says (after Storey, *A direct approach to
    false discovery rates*, JRSS B 2002): below the point where the fraction ``q`` of the low values lies,
    there should be ``q`` times that share of all values. The mean over ``q`` from .1 to .4 counts. Nothing is
    fitted, so it can neither run away nor lose a group, and without a low group the share is near 0.

    Even odds of being high lie in the deepest valley of the values between three quarters of that share and
    one and a half of it; where there is none, at the low end of that range: groups that overlap make the
    share an upper bound. How fast the odds change is what two normal distributions of equal width would give.

    Args:
        limit: values are clipped to ``[-limit, limit]``.
        bins: histogram bins.
        mixed: so many of the values that are low for sure are high after all, for each one of the low group;
            in [0, 1].

    Attributes:
        values: :class:`Histogram` of all values. low: :class:`Histogram` of the low ones.
    """

    def __init__(self, limit: float = 3.0, bins: int = 256, mixed: float = 0.0) -> None:
        super().__init__()
        self.limit, self.mixed = limit, mixed
        self.values = Histogram(limit, bins)
        self.low = Histogram(limit, bins)

    def low_share(self) -> Tensor:
        """Share of the low group, 0-d float64 in [0, 0.7]; 0 without values."""
        low = self.low.below()
        share = self.low.counts / self.low.counts.sum().clamp_min(1)
        # of each bin, what lies in the range: all low values may be in one bin
        least, most = _QUANTILES
        part = low.clamp(least, most) - (low - share).clamp(least, most)
        ratio = self.values.below() / low.clamp_min(1e-9)
        found = (part * ratio).sum() / (most - least)
        return (found / (1 + found * self.mixed)).clamp(0, _MAX_SHARE)

    def cut(self) -> tuple[Tensor, Tensor]:
        """The value from which on values are high, and the estimated share of the low group, 0-d float64.

        Where the groups are told apart by a valley, it says more about the share than their low end does.
        """
        share = self.low_share()
        least, most = (self.values.quantile(share * x) for x in _SEARCH)
        valley = self.values.valley(least, most)
        under = torch.where(self.values.middle < valley, self.values.counts, 0).sum()
        found = under / self.values.counts.sum().clamp_min(1)
        none = valley.isnan()
        return torch.where(none, least, valley), torch.where(none, share, found)

    def log_odds(self, value: Tensor, share: float | None = None) -> Tensor:
        """``log(P(high) / P(low))`` of values of any shape, in float64; NaN stays NaN.

        Args:
            value: the values.
            share: of the low group, if it is known from elsewhere: then even odds lie at its quantile.
        """
        cut, low_share = self.cut()
        if share is not None:
            low_share = low_share.new_full((), share)
            cut = self.values.quantile(low_share)
        mean = self.low.mean()
        high = (self.values.mean() - low_share * mean) / (1 - low_share)
        slope = (high - mean).clamp_min(0.1) / self.low.variance().clamp_min(0.01)
        return slope * (value.double().clamp(-self.limit, self.limit) - cut)


class ClassFloors(StateModule):
    """How a value compares with the others of its class: one histogram per class, one value per sample.

    Args:
        num_classes: number of classes ``C``. num_samples: samples ``N``.
        limit: values are clipped to ``[-limit, limit]``. bins: histogram bins of each class.

    Attributes:
        counts: ``(C, bins)`` int32. label: ``(N,)`` int64, the class that a sample is counted in, -1 = none.
    """

    counts: Tensor
    label: Tensor

    def __init__(self, num_classes: int, num_samples: int, limit: float = 3.0, bins: int = 64) -> None:
        super().__init__()
        self.limit, self.bins = limit, bins
        self.register_buffer("counts", torch.zeros(num_classes, bins, dtype=torch.int32))
        self.register_buffer("label", torch.full((num_samples,), -1))

    def replace(self, index: Tensor, old: Tensor, new: Tensor, label: Tensor, once: Tensor) -> None:
        """Move the samples of ``once`` ``(B,)`` bool from ``old`` to ``new`` (NaN = not there)."""
        before = self.label[index]
        flat = self.counts.view(-1)
        for value, classes, sign in ((old, before, -1), (new, label, 1)):
            there = once & ~value.isnan() & (classes >= 0)
            place = classes.clamp_min(0) * self.bins + _bin(value, self.limit, self.bins)
            flat.index_add_(0, place, there.int() * sign)
        self.label.index_copy_(0, index, torch.where(new.isnan(), before, label))

    def among_best(self, value: Tensor, label: Tensor, share: float) -> Tensor:
        """``(B,)`` bool: fewer than ``share`` of the class's values are clearly higher (in a higher bin)."""
        counts = self.counts[label]
        higher = counts.sum(dim=1, keepdim=True) - counts.cumsum(dim=1)
        above = higher.gather(1, _bin(value, self.limit, self.bins).unsqueeze(1)).squeeze(1)
        return ~value.isnan() & (above < share * counts.sum(dim=1).clamp_min(1))
