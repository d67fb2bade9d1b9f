"""PRISM's rule in tensors and in Python floats: the same decisions, and those of the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nrml.filters import rank_rule

NAN = math.nan


def both(
    log_prob: Tensor, index: Tensor, window: Tensor, rate: float, robust: bool = False, active: Any = None
) -> rank_rule.Decision:
    """The decision that both ways make, with the window that both leave."""
    other = window.clone()
    host = rank_rule._on_host(log_prob, index, window, rate, robust, active)
    device = rank_rule._on_device(log_prob, index, other, rate, robust, active)
    assert torch.equal(host.drop, device.drop)
    assert torch.equal(host.fallback, device.fallback)
    for a, b in ((host.threshold, device.threshold), (host.quantile, device.quantile), (window, other)):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=0, equal_nan=True)
    return host


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.29, 0.5, 0.9])
def test_both_ways_agree_over_a_run(rate: float, dtype: torch.dtype, robust: bool) -> None:
    g = torch.Generator().manual_seed(0)
    window = torch.full((4,), NAN, dtype=torch.float64)
    fell_back = 0
    for step in range(60):
        size = (1, 2, 7, 64)[step % 4]
        log_prob = torch.rand(size, generator=g, dtype=torch.float64).mul(step % 5 + 0.1).neg().to(dtype)
        if step % 3 == 0:  # ties
            log_prob = log_prob.mul(4).round().div(4)
        log_prob[torch.rand(size, generator=g) < 0.2] = NAN
        index = torch.randperm(size, generator=g)
        active = (None, torch.tensor(True), torch.tensor(step > 20))[step % 3]
        decided = both(log_prob, index, window, rate, robust, active)
        assert not decided.drop[log_prob.isnan()].any()
        fell_back += int(decided.fallback)
    assert bool(fell_back) is (rate >= 0.5)


def test_the_threshold_is_compared_in_the_type_of_the_scores() -> None:
    """A mean just below the scores, which float32 rounds to them, has nothing above it."""
    close = torch.full((40,), -1.0 - 1e-10, dtype=torch.float64)
    decided = both(torch.tensor([-1.0, -1.0]), torch.tensor([5, 3]), close, 0.5)
    assert decided.fallback
    assert decided.drop.tolist() == [False, True]


@pytest.mark.parametrize("robust", [False, True])
def test_values_far_apart_neither_overflow_nor_vanish(robust: bool) -> None:
    """As when a window that vMF scores have written goes on with other scores."""
    window = torch.tensor([NAN, -1.0], dtype=torch.float64)
    low = both(torch.tensor([-960.0, -950.0, -2.0, -1.5]), torch.arange(4), window, 0.5, robust)
    assert low.quantile == -950.0
    assert low.threshold.isfinite()
    window = torch.tensor([NAN, -900.0], dtype=torch.float64)
    certain = both(torch.zeros(4), torch.arange(4), window, 0.5, robust)
    assert certain.threshold == -900.0
    assert not certain.drop.any()


def test_a_default_device_of_another_kind_does_not_matter() -> None:
    with torch.device("meta"):
        log_prob, index = torch.tensor([-2.0, -1.0], device="cpu"), torch.arange(2, device="cpu")
        window = torch.full((3,), NAN, dtype=torch.float64, device="cpu")
        decided = rank_rule.rank_rule(log_prob, index, window, 0.5)
    assert decided.drop.tolist() == [True, False]
    assert decided.threshold == -2.0


def test_no_opinions_and_no_rows() -> None:
    for log_prob in (torch.empty(0), torch.full((3,), NAN)):
        window = torch.tensor([NAN, -1.0], dtype=torch.float64)
        decided = both(log_prob, torch.arange(len(log_prob)), window, 0.5)
        assert not decided.drop.any()
        assert decided.threshold.isnan()
        assert window[-1] == -1.0


def test_a_certain_batch_says_nothing() -> None:
    window = torch.tensor([NAN, -1.0], dtype=torch.float64)
    decided = both(torch.zeros(4), torch.arange(4), window, 0.5)
    assert not decided.drop.any()
    assert window[0].isnan()
    assert window[1] == -1.0
    empty = torch.full((2,), NAN, dtype=torch.float64)
    assert not both(torch.zeros(4), torch.arange(4), empty, 0.5).drop.any()
    assert empty.isnan().all()
