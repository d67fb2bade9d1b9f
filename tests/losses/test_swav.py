"""Sinkhorn: closed forms, the official steps in float64, marginals, range. SwAVLoss: formula and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import SwAVLoss, sinkhorn


def cosines(rows: int, prototypes: int, dim: int = 8, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(rows, dim, generator=g, dtype=torch.float64), dim=1)
    return z @ F.normalize(torch.randn(prototypes, dim, generator=g, dtype=torch.float64), dim=1).T


def in_log_domain(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The steps of the card on log Q (K x B), in float64."""
    log_q = (scores.double() / epsilon).T
    prototypes, rows = log_q.shape
    log_q = log_q - log_q.flatten().logsumexp(0)
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(1, keepdim=True) - math.log(prototypes)
        log_q = log_q - log_q.logsumexp(0, keepdim=True) - math.log(rows)
    return (log_q + math.log(rows)).exp().T


def in_plain_numbers(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def test_closed_forms():
    close = {"rtol": 0, "atol": 5e-5}
    torch.testing.assert_close(sinkhorn(torch.full((5, 4), 0.3)), torch.full((5, 4), 0.25))
    same = torch.tensor([[0.1, 0.0], [0.1, 0.0]])
    torch.testing.assert_close(sinkhorn(same), torch.full((2, 2), 0.5))
    four = torch.tensor([[0.1, 0.0], [0.05, 0.0], [0.0, 0.0], [-0.02, 0.0]])
    torch.testing.assert_close(sinkhorn(four)[:, 0], torch.tensor([0.7952, 0.5882, 0.3444, 0.2605]), **close)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7, 20])
def test_is_the_official_loop(iterations):
    scores = cosines(30, 7)
    want = in_plain_numbers(scores, 0.05, iterations)
    torch.testing.assert_close(in_log_domain(scores, 0.05, iterations), want, rtol=1e-10, atol=0)
    torch.testing.assert_close(sinkhorn(scores, 0.05, iterations), want, rtol=1e-9, atol=1e-15)
    single = sinkhorn(scores.float(), 0.05, iterations)
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), want, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("iterations", [3, 40])
@pytest.mark.parametrize("epsilon", [0.01, 0.003])
def test_survives_small_epsilon_and_half_precision(dtype, epsilon, iterations):
    """exp(1 / 0.01) = 3e43 is beyond float32, exp(1 / 0.05) = 5e8 beyond float16."""
    scores = cosines(40, 9).to(dtype)
    scores[:, 0] = -1  # a prototype that all are far from
    scores[0] = -1  # and a sample far from all
    scores[3, 4] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sinkhorn(scores, epsilon, iterations)
    assert got.dtype is torch.float32
    want = in_log_domain(scores, epsilon, iterations)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(40))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_many_iterations_reach_the_exact_marginals(scale):
    """The plan of entropic transport: equal column masses, and log Q - scores / eps is rank 1."""
    scores = cosines(24, 6) * scale
    got = sinkhorn(scores, 0.5, 3000)
    torch.testing.assert_close(got.sum(dim=0), torch.full((6,), 4.0, dtype=torch.float64), rtol=1e-7, atol=0)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(24, dtype=torch.float64))
    rest = got.log() - scores / 0.5
    rest = rest - rest.mean(dim=0) - rest.mean(dim=1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-8


def test_constants_over_samples_cancel_and_constants_of_a_sample_do_not():
    scores = cosines(20, 5)
    want = sinkhorn(scores)
    g = torch.Generator().manual_seed(3)
    torch.testing.assert_close(sinkhorn(scores + 50), want)
    torch.testing.assert_close(sinkhorn(scores + torch.randn(5, generator=g)), want, rtol=1e-6, atol=1e-9)
    moved = sinkhorn(scores + 0.1 * torch.randn(20, 1, generator=g))
    assert (moved - want).abs().max() > 0.01


def test_order_and_the_input_are_kept_and_no_gradient_flows():
    scores = cosines(20, 5).requires_grad_()
    before = scores.detach().clone()
    want = sinkhorn(scores)
    assert not want.requires_grad
    assert torch.equal(scores, before)
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sinkhorn(scores[rows][:, [3, 1, 4, 0, 2]]), want[rows][:, [3, 1, 4, 0, 2]])
    assert sinkhorn(scores[:0]).shape == (0, 5)


def test_wrong_sinkhorn_arguments_are_named():
    with pytest.raises(ValueError, match=r"'scores' must be \(B, K\).*\(3,\)"):
        sinkhorn(torch.zeros(3))
    with pytest.raises(ValueError, match="'epsilon' must be positive, got 0"):
        sinkhorn(torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match="'iterations' must be at least 1, got 0"):
        sinkhorn(torch.zeros(3, 2), iterations=0)


def batch(crops: int = 4, rows: int = 6, prototypes: int = 5) -> tuple[list[Tensor], list[Tensor], list[int]]:
    g = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(rows, prototypes, generator=g, dtype=torch.float64).requires_grad_() for _ in range(crops)
    ]
    assigned = [2, 0]
    return scores, [sinkhorn(scores[i]) for i in assigned], assigned


def slow(
    scores: list[Tensor], codes: list[Tensor], assigned: list[int], t: float, w: list[float] | None = None
) -> Tensor:
    w = w or [1.0] * len(scores[0])
    total = torch.zeros((), dtype=torch.float64)
    for q, i in zip(codes, assigned, strict=True):
        one = torch.zeros((), dtype=torch.float64)
        for v, s in enumerate(scores):
            for b, weight in enumerate(w):
                if v != i:
                    p = (s[b] / t).exp() / (s[b] / t).exp().sum()
                    one = one - weight * (q[b] * p.log()).sum() / sum(w)
        total = total + one / (len(scores) - 1) / len(codes)
    return total


@pytest.mark.parametrize("weight", [None, [1.0, 0, 1, 1, 0, 1], [0.5, 1, 0.25, 0, 1, 0.125]])
@pytest.mark.parametrize("num_codes", [1, 2])
def test_value_and_gradient_are_the_formula(weight, num_codes):
    scores, codes, assigned = batch()
    codes, assigned = codes[:num_codes], assigned[:num_codes]
    w = None if weight is None else torch.tensor(weight)
    got, want = SwAVLoss(0.3)(scores, codes, assigned, w), slow(scores, codes, assigned, 0.3, weight)
    torch.testing.assert_close(got, want)
    got_grad = torch.autograd.grad(got, scores, allow_unused=True)
    want_grad = torch.autograd.grad(want, scores, allow_unused=True)
    for x, y in zip(got_grad, want_grad, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y)


def test_gradcheck_and_no_gradient_for_the_codes():
    scores, codes, assigned = batch(3, 3, 4)
    codes = [q.requires_grad_() for q in codes]
    assert torch.autograd.gradcheck(
        lambda *s: SwAVLoss(0.3)(s, [q.detach() for q in codes], assigned), scores
    )
    SwAVLoss()(scores, codes, assigned).backward()
    assert all(q.grad is None for q in codes)


def test_uniform_codes_and_equal_scores_give_log_k_and_prototypes_can_be_permuted():
    equal = [torch.ones(4, 3000, dtype=torch.float64) for _ in range(3)]
    loss = SwAVLoss()(equal, [sinkhorn(x) for x in equal[:2]], [0, 1])
    assert loss.item() == pytest.approx(math.log(3000), abs=1e-12)
    scores, codes, assigned = batch()
    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(
        SwAVLoss()([s[:, order] for s in scores], [q[:, order] for q in codes], assigned),
        SwAVLoss()(scores, codes, assigned),
    )


def test_dropped_images_change_nothing_even_if_they_hold_nan():
    scores, codes, assigned = batch()
    w = torch.tensor([1.0, 0, 1, 1, 1, 1])
    kept = w > 0
    want = SwAVLoss()([s[kept] for s in scores], [q[kept] for q in codes], assigned)
    with torch.no_grad():
        scores[0][1] = math.nan
        codes[0][1] = math.inf
    got = SwAVLoss()(scores, codes, assigned, w)
    torch.testing.assert_close(got, want)
    got.backward()
    assert all((s.grad[1] == 0).all() and s.grad.abs().sum() > 0 for s in scores)
    none = SwAVLoss()(scores, codes, assigned, torch.zeros(6))
    assert none == 0
    assert all((g == 0).all() for g in torch.autograd.grad(none, scores))


def test_half_precision_and_autocast_give_the_fp32_loss():
    scores, codes, assigned = batch()
    half = [s.detach().half() for s in scores]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = SwAVLoss(0.01)(half, codes, assigned)
    torch.testing.assert_close(got, SwAVLoss(0.01)([s.float() for s in half], codes, assigned))
    assert got.isfinite()


def test_wrong_loss_arguments_are_named():
    scores, codes, assigned = batch()
    with pytest.raises(ValueError, match="at least two crops, got 1"):
        SwAVLoss()(scores[:1], codes[:1], [0])
    with pytest.raises(ValueError, match="got 2 codes for 1 positions"):
        SwAVLoss()(scores, codes, [0])
    with pytest.raises(ValueError, match=r"different positions from 0 to 3, got \[0, 4\]"):
        SwAVLoss()(scores, codes, [0, 4])
    with pytest.raises(ValueError, match=r"different positions from 0 to 3, got \[1, 1\]"):
        SwAVLoss()(scores, codes, [1, 1])
    with pytest.raises(ValueError, match=r"'scores\[3\]' must have the shape.*\(6, 5\), got \(5, 5\)"):
        SwAVLoss()([*scores[:3], scores[3][:5]], codes, assigned)
    with pytest.raises(ValueError, match="'temperature' must be positive"):
        SwAVLoss(0)
