"""MoCHiLoss: MoCo's logits, the mixing formulas in float64 with gradients, draws, closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import MoCHiLoss, mochi

B, DIM, QUEUE, HARD, MIXED, QUERY_MIXED = 4, 5, 23, 6, 7, 9


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, queue = (torch.randn(n, DIM, generator=g, dtype=torch.float64) for n in (B, B, QUEUE))
    return q.requires_grad_(), k, queue


def draws(seed: int = 1, hard: int = HARD) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hard_i": torch.randint(hard, (B, MIXED), generator=g),
        "hard_j": torch.randint(hard, (B, MIXED), generator=g),
        "alpha": torch.rand(B, MIXED, generator=g, dtype=torch.float64),
        "query_hard": torch.randint(hard, (B, QUERY_MIXED), generator=g),
        "beta": torch.rand(B, QUERY_MIXED, generator=g, dtype=torch.float64) / 2,
    }


def slow(q: Tensor, k: Tensor, queue: Tensor, t: float, d: dict[str, Any], w: Tensor | None = None) -> Tensor:
    """One query at a time, every synthetic row built."""
    q, k, queue = (F.normalize(x, dim=1) for x in (q, k.detach(), queue.detach()))
    w = torch.ones(len(q), dtype=torch.float64) if w is None else w
    total = torch.zeros((), dtype=torch.float64)
    for b, x in enumerate(q):
        negatives = list(queue)
        order = (queue @ x).argsort(descending=True)
        if d:
            for i, j, a in zip(d["hard_i"][b], d["hard_j"][b], d["alpha"][b], strict=True):
                h = a * queue[order[i]] + (1 - a) * queue[order[j]]
                negatives.append(h / h.norm())
            for j, beta in zip(d["query_hard"][b], d["beta"][b], strict=True):
                h = beta * x.detach() + (1 - beta) * queue[order[j]]
                negatives.append(h / h.norm())
        logits = torch.stack([x @ k[b], *(x @ n.detach() for n in negatives)]) / t
        total = total + w[b] * (logits.logsumexp(0) - logits[0])
    return total / w.sum()


@pytest.mark.parametrize("t", [0.2, 0.005])
@pytest.mark.parametrize("weight", [None, [1, 0, 1, 1], [0.5, 1, 0, 0.1]])
@pytest.mark.parametrize("mix", [True, False])
def test_value_and_gradient_are_the_formula(t, weight, mix):
    q, k, queue = inputs()
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    d = draws() if mix else {}
    loss = MoCHiLoss(t, HARD, MIXED, QUERY_MIXED) if mix else MoCHiLoss(t)
    got, want = loss(q, k, queue, w, **d), slow(q, k, queue, t, d, w)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, q)[0], torch.autograd.grad(want, q)[0], rtol=1e-8, atol=1e-12
    )


def test_plain_moco_gradcheck():
    q, k, queue = inputs()
    assert torch.autograd.gradcheck(lambda x: 2 * MoCHiLoss(0.3)(x, k, queue), q)


@pytest.mark.parametrize(("mixed", "query_mixed"), [(MIXED, 0), (0, QUERY_MIXED)])
def test_each_kind_alone(mixed, query_mixed):
    q, k, queue = inputs()
    d = draws()
    kept = {n: x for n, x in d.items() if (n in ("query_hard", "beta")) == (mixed == 0)}
    empty = {n: x[:, :0] for n, x in d.items() if n not in kept}
    got = MoCHiLoss(0.2, HARD, mixed, query_mixed)(q, k, queue, **kept)
    torch.testing.assert_close(got, slow(q, k, queue, 0.2, {**kept, **empty}))


def test_one_step_of_the_card():
    """q = (1, 0), n1 = (0, 1), n2 = (.6, .8): n2 is the nearest. q.h = .3162 and q.h' = .8455."""
    q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    queue = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    logits = torch.tensor([0.0, 0.0, 0.6, 0.316228, 0.845489])
    got = MoCHiLoss(1.0, 2, 1, 1)(
        q,
        k,
        queue,
        hard_i=torch.tensor([[0]]),
        hard_j=torch.tensor([[1]]),
        alpha=torch.tensor([[0.5]]),
        query_hard=torch.tensor([[0]]),
        beta=torch.tensor([[0.4]]),
    )
    torch.testing.assert_close(got, logits.logsumexp(0), rtol=0, atol=1e-5)


def test_blocks_of_every_size_give_the_same(monkeypatch):
    q, k, queue = inputs()
    loss, d = MoCHiLoss(0.2, HARD, MIXED, QUERY_MIXED), draws()
    want = loss(q, k, queue, **d)
    monkeypatch.setattr(mochi, "CPU_BLOCK", 3 * MIXED * DIM)
    torch.testing.assert_close(loss(q, k, queue, **d), want, rtol=1e-12, atol=0)


def test_more_synthetic_negatives_never_lower_the_loss():
    q, k, queue = inputs()
    plain = MoCHiLoss(0.2)(q, k, queue)
    last = plain
    for n in (1, 3, MIXED):
        d = {name: x[:, :n] for name, x in draws().items()}
        more = MoCHiLoss(0.2, HARD, n, n)(q, k, queue, **d)
        assert more > last
        last = more


def test_own_draws_follow_their_laws():
    torch.manual_seed(0)
    query = torch.zeros(50, 2)
    pairs = mochi._complete(query, 5, 400, None, None, None, top_share=1.0)
    mixed = mochi._complete(query, 5, 400, None, None, None, top_share=0.5)
    assert (pairs.first != pairs.second).all()
    counts = torch.bincount((pairs.first * 5 + pairs.second).flatten(), minlength=25).view(5, 5)
    off = counts[~torch.eye(5, dtype=torch.bool)].double() / counts.sum()
    assert (off - 1 / 20).abs().max() < 0.006
    assert mixed.first is None
    assert mixed.second.unique().tolist() == [0, 1, 2, 3, 4]
    for share, top in ((pairs.share, 1.0), (mixed.share, 0.5)):
        assert 0 <= share.min() < 0.001 * top
        assert 0.999 * top < share.max() < top
        assert abs(share.mean() / top - 0.5) < 0.01


def test_the_query_is_never_the_larger_part_of_its_own_mixtures():
    q, queue = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    # at this temperature the loss is the largest logit; b / sqrt(b^2 + (1 - b)^2) is 0.7071 for b = 0.5
    largest = 1e-4 * MoCHiLoss(1e-4, 1, 0, 4000)(q, -queue, queue)
    assert 0.70 < float(largest) < 0.7072


def test_own_draws_come_from_the_global_generator():
    q, k, queue = inputs()
    loss = MoCHiLoss(0.2, HARD, MIXED, QUERY_MIXED)
    torch.manual_seed(3)
    first, second = loss(q, k, queue), loss(q, k, queue)
    torch.manual_seed(3)
    assert loss(q, k, queue) == first
    assert first != second
    state = torch.get_rng_state()
    MoCHiLoss(0.2)(q, k, queue)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_queue_smaller_than_the_hard_set(rows):
    q, k, queue = inputs()
    loss = MoCHiLoss(0.2, HARD, MIXED, QUERY_MIXED)(q, k, queue[:rows])
    (grad,) = torch.autograd.grad(loss, q)
    assert grad.isfinite().all()
    if rows == 0:
        assert loss == 0
        assert grad.abs().max() < 1e-15
    else:
        assert loss > MoCHiLoss(0.2)(q, k, queue[:rows])


def test_keys_and_queue_are_constants_and_stay_as_they_are():
    q, k, queue = inputs()
    k.requires_grad_()
    queue.requires_grad_()
    before = [x.detach().clone() for x in (q, k, queue)]
    MoCHiLoss(0.2, HARD, MIXED, QUERY_MIXED)(q, k, queue).backward()
    assert k.grad is None
    assert queue.grad is None
    assert all(torch.equal(x, y) for x, y in zip(before, (q, k, queue), strict=True))


def test_scale_does_not_matter_and_the_gradient_is_tangential():
    q, k, queue = inputs()
    loss, d = MoCHiLoss(0.2, HARD, MIXED, QUERY_MIXED), draws()
    value = loss(q, k, queue, **d)
    torch.testing.assert_close(loss(7 * q, 0.1 * k, 3 * queue, **d), value)
    (grad,) = torch.autograd.grad(value, q)
    assert (q * grad).sum(dim=1).abs().max() < 1e-13


def test_opposite_partners_are_finite():
    queue = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    q = torch.tensor([[1.0, 0.1]], requires_grad=True)
    half = torch.tensor([[0.5]])
    loss = MoCHiLoss(0.2, 2, 1, 0)(
        q, q.detach(), queue, hard_i=torch.tensor([[0]]), hard_j=torch.tensor([[1]]), alpha=half
    )
    loss.backward()
    assert loss.isfinite()
    assert q.grad.isfinite().all()


def test_dropped_queries_change_nothing_even_if_they_hold_nan():
    q, k, queue = inputs()
    d = draws()
    w = torch.tensor([1.0, 0, 1, 1])
    kept = w > 0
    loss = MoCHiLoss(0.2, HARD, MIXED, QUERY_MIXED)
    want = loss(q[kept], k[kept], queue, **{n: x[kept] for n, x in d.items()})
    (want_grad,) = torch.autograd.grad(want, q)
    with torch.no_grad():
        q[1], k[1] = math.nan, math.inf
    got = loss(q, k, queue, w, **d)
    (grad,) = torch.autograd.grad(got, q)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert (grad[1] == 0).all()
    none = loss(q, k, queue, torch.zeros(B))
    assert none == 0
    assert (torch.autograd.grad(none, q)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_give_the_fp32_loss(dtype):
    q, k, queue = (x.detach().to(dtype) for x in inputs())
    d = {n: x.float() if x.is_floating_point() else x for n, x in draws().items()}
    loss = MoCHiLoss(0.01, HARD, MIXED, QUERY_MIXED)
    want = loss(q.float(), k.float(), queue.float(), **d)
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(q, k, queue, **d)
        got.backward()
    assert got.dtype is torch.float32
    assert torch.equal(got, want)
    assert q.grad.dtype is dtype
    assert q.grad.isfinite().all()


def test_wrong_arguments_are_named():
    q, k, queue = inputs()
    with pytest.raises(ValueError, match=r"'k' must have the shape \(4, 5\) of 'q', got \(3, 5\)"):
        MoCHiLoss()(q, k[:3], queue)
    with pytest.raises(ValueError, match=r"'queue' must be \(K, 5\) like 'q', got shape \(23, 4\)"):
        MoCHiLoss()(q, k, queue[:, :4])
    with pytest.raises(ValueError, match=r"draws must have shape \(4, 7\).*got \(4, 3\)"):
        MoCHiLoss(0.2, HARD, MIXED)(q, k, queue, alpha=torch.rand(B, 3))
    with pytest.raises(ValueError, match="'temperature' must be positive, got 0"):
        MoCHiLoss(0)
    with pytest.raises(ValueError, match="'num_mixed' must not be negative, got -1"):
        MoCHiLoss(0.2, 4, -1)
    with pytest.raises(ValueError, match="'num_hard' must be at least 1 to mix"):
        MoCHiLoss(0.2, 0, 1)
