"""Per label two groups of samples, absent and present, and how many given labels contradict them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.state import StateModule

_MIN_DEVIATION = 0.05
_MIN_DISTANCE = 0.5  # of the means, in deviations
_START_RATE = 0.1
_PRIOR = 20.0  # samples' worth of belief that a label's rates are those of all labels
_MAX_RATE = 0.7
_MIN_RATE = 1e-3


class LabelGroups(StateModule):
    """For every label a mixture of two normal distributions that the samples with and without it share.

    One value per sample and label says how much the sample looks as if it had the label. Whatever the given
    label is, the value of a sample that lacks it follows one distribution and that of a sample that has it
    another, of equal width; given and true label differ with a probability for each of the two kinds of
    errors. Both groups of samples, those with the label and those without, thus speak about the same two
    distributions, so that also the few missing labels among very many rightly absent ones are told by where
    present ones lie, and not by a bump of their own.

    The values are kept as histograms, so a step costs the same for every size of the training set. The fit is
    expectation maximisation, one round per step, from where the last one ended. The rates of a label with few
    samples lean towards those of all labels. Means closer than half a deviation are no two groups: all given
    labels are then taken for right.

    Args:
        num_labels: labels ``L``.
        limit: values are clipped to ``[-limit, limit]``.
        bins: histogram bins.

    Attributes:
        counts: ``(2, L, bins)`` int64, of samples given without and with the label.
        mean: ``(2, L)`` float64, of truly absent and present ones. deviation: ``(L,)`` float64.
        rate: ``(2, L)`` float64, share of wrong ones among those given without the label (missing) and with
            it (extra).
    """

    counts: Tensor
    mean: Tensor
    deviation: Tensor
    rate: Tensor
    middle: Tensor

    def __init__(self, num_labels: int, limit: float = 3.0, bins: int = 128) -> None:
        super().__init__()
        self.limit, self.bins, self.num_labels = limit, bins, num_labels
        wide = torch.float64
        self.register_buffer("counts", torch.zeros(2, num_labels, bins, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(2, num_labels, dtype=wide))
        self.register_buffer("deviation", torch.ones(num_labels, dtype=wide))
        self.register_buffer("rate", torch.full((2, num_labels), _START_RATE, dtype=wide))
        step = 2 * limit / bins
        middle = torch.arange(bins, dtype=wide) * step - limit + step / 2
        self.register_buffer("middle", middle, persistent=False)

    def replace(self, old: Tensor, new: Tensor, label: Tensor, count: Tensor) -> None:
        """Move values of samples with given labels from ``old`` to ``new``.

        Args:
            old, new: ``(B, L)``, NaN = not there.
            label: ``(B, L)`` given labels, 0 or 1.
            count: ``(B,)`` bool, rows that count.
        """
        column = torch.arange(self.num_labels, device=label.device)
        for value, sign in ((old, -1), (new, 1)):
            there = count.unsqueeze(1) & ~value.isnan()
            place = (value.nan_to_num(0.0) + self.limit) * (self.bins / (2 * self.limit))
            place = place.long().clamp_(0, self.bins - 1)
            place += ((label > 0).long() * self.num_labels + column) * self.bins
            self.counts.view(-1).index_add_(0, place.flatten(), (there.long() * sign).flatten())

    def fit(self, restart: Tensor, noise_rate: float | None = None) -> None:
        """One round of expectation maximisation.

        Args:
            restart: 0-d bool, start anew: the two distributions are those of the given labels.
            noise_rate: share in [0, 1) of each label's given samples that are extra, as many being missing;
                ``None`` = estimated, from a start of one tenth.
        """
        weight = self.counts.double()  # given x label x bin
        start = torch.stack([weight[0], torch.zeros_like(weight[1])])
        absent = torch.where(restart, start, weight * self._absent())
        mass = torch.stack([absent, weight - absent])  # true x given x label x bin
        size = mass.sum(dim=(1, 3))
        mean = (mass.sum(dim=1) @ self.middle) / size.clamp_min(1e-9)
        spread = (mass.sum(dim=1) * (self.middle - mean.unsqueeze(2)) ** 2).sum(dim=(0, 2))
        total = size.sum(dim=0)
        there = (size > 0).all(dim=0)
        self.mean.copy_(torch.where(there, mean, self.mean))
        deviation = (spread / total.clamp_min(1)).sqrt().clamp_min(_MIN_DEVIATION)
        self.deviation.copy_(torch.where(there, deviation, self.deviation))
        rate = torch.where(restart, _START_RATE, self._rate(mass, noise_rate))
        self.rate.copy_(torch.where(there, rate, self.rate))

    def _rate(self, mass: Tensor, noise_rate: float | None) -> Tensor:
        """``(2, L)`` rates from the mass of true x given x label x bin, or from what is assumed."""
        given = mass.sum(dim=(0, 3))
        if noise_rate is not None:
            extra = torch.full_like(given[1], noise_rate)
            rate = torch.stack([noise_rate * given[1] / given[0].clamp_min(1), extra])
        else:
            wrong = torch.stack([mass[1, 0], mass[0, 1]]).sum(dim=2)
            common = wrong.sum(dim=1) / given.sum(dim=1).clamp_min(1)
            rate = (wrong + _PRIOR * common.unsqueeze(1)) / (given + _PRIOR)
        return rate.clamp(_MIN_RATE, _MAX_RATE)

    def _odds(self, value: Tensor) -> Tensor:
        """Log-likelihood ratio of present against absent, ``(..., L)`` float64."""
        low, high = self.mean
        clipped = value.double().clamp(-self.limit, self.limit)
        return (high - low) / self.deviation**2 * (clipped - (low + high) / 2)

    def _absent(self) -> Tensor:
        """``(2, L, bins)`` probability that a sample of this given label and bin truly lacks the label."""
        odds = self._odds(self.middle.unsqueeze(1)).T  # label x bin
        missing, extra = self.rate.unsqueeze(2)
        prior = torch.stack([torch.logit(1 - missing), torch.logit(extra)])
        return (prior - odds).sigmoid()

    def two(self) -> Tensor:
        """``(L,)`` bool, labels whose samples form two groups."""
        return self.mean[1] - self.mean[0] >= _MIN_DISTANCE * self.deviation

    def log_odds(self, value: Tensor, label: Tensor) -> Tensor:
        """``(B, L)`` float64 log-odds that the given labels are right; NaN stays NaN.

        Args:
            value: ``(B, L)``.
            label: ``(B, L)`` given labels, 0 or 1.
        """
        missing, extra = self.rate
        odds = self._odds(value)
        right = torch.where(label > 0, odds - torch.logit(extra), -odds - torch.logit(missing))
        single = -torch.logit(torch.full_like(right, _MIN_RATE))
        return torch.where(self.two() | value.isnan(), right, single)

    def rates(self) -> Tensor:
        """``(2, L)`` float64 ``rate``; 0 for labels without two groups."""
        return torch.where(self.two(), self.rate, 0.0)
