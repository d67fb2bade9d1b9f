"""BYOLLoss: closed forms, the formula in float64 with its gradient, weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_nrml.losses import BYOLLoss


def rows(n: int = 5, dim: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dim, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]


def slow(p_a: Tensor, p_b: Tensor, t_a: Tensor, t_b: Tensor, w: list[float]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, weight in enumerate(w):
        for p, t in ((p_a[i], t_b[i]), (p_b[i], t_a[i])):
            total = total + weight * (p / p.norm() - t.detach() / t.detach().norm()).square().sum()
    return total / sum(w)


def test_closed_forms():
    x, y = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    assert BYOLLoss()(x, y, y, x) == 0
    assert BYOLLoss()(x, y, -y, -x) == 8
    assert BYOLLoss()(x, x, y, y) == 4
    assert BYOLLoss()(x, y, y, -x) == 4  # one view right, the other opposite: targets are crossed


@pytest.mark.parametrize("weight", [None, [1, 0, 0, 1, 1], [0.2, 1, 0.7, 0, 0.4]])
def test_value_and_gradient_are_the_formula(weight):
    parts = rows()
    w = None if weight is None else torch.tensor(weight)
    got, want = BYOLLoss()(*parts, w), slow(*parts, weight or [1] * 5)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # weights are float32
    online = parts[:2]
    for x, y in zip(torch.autograd.grad(got, online), torch.autograd.grad(want, online), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-12)


def test_gradcheck_and_no_gradient_for_the_targets():
    p_a, p_b, t_a, t_b = rows(3)
    loss = BYOLLoss()
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, t_a, t_b), (p_a, p_b))
    loss(p_a, p_b, t_a, t_b).backward()
    assert t_a.grad is None
    assert t_b.grad is None


def test_scale_does_not_matter_and_the_gradient_is_tangential():
    parts = rows()
    value = BYOLLoss()(*parts)
    torch.testing.assert_close(
        BYOLLoss()(*(x * s for x, s in zip(parts, (3, 0.1, 7, 40), strict=True))), value
    )
    value.backward()
    assert (parts[0] * parts[0].grad).sum(dim=1).abs().max() < 1e-14


def test_dropped_rows_change_nothing_even_if_they_hold_nan():
    parts = rows()
    w = torch.tensor([1.0, 0, 1, 1, 1])
    want = BYOLLoss()(*(x[w > 0] for x in parts))
    with torch.no_grad():
        parts[0][1], parts[3][1] = math.nan, math.inf
    got = BYOLLoss()(*parts, w)
    got.backward()
    torch.testing.assert_close(got, want)
    assert (parts[0].grad[1] == 0).all()
    assert (parts[1].grad[1] == 0).all()
    assert parts[0].grad.abs().sum() > 0


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_kept_is_an_exact_zero(n):
    parts = rows(n)
    loss = BYOLLoss()(*parts, torch.zeros(n))
    loss.backward()
    assert loss == 0
    assert (parts[0].grad == 0).all()


def test_half_precision_and_autocast_give_the_fp32_loss():
    parts = [x.detach().half() for x in rows()]
    parts[0] = parts[0] * 3000  # squares overflow float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = BYOLLoss()(*parts)
    assert got.dtype is torch.float32
    assert torch.equal(got, BYOLLoss()(*(x.float() for x in parts)))
    assert got.isfinite()


def test_wrong_shapes_are_named():
    parts = rows()
    with pytest.raises(ValueError, match=r"'t_a' must have the shape \(5, 4\) of 'p_a', got \(4, 4\)"):
        BYOLLoss()(parts[0], parts[1], parts[2][:4], parts[3])
    with pytest.raises(ValueError, match=r"'weight' must have shape \(5,\)"):
        BYOLLoss()(*parts, torch.ones(3))
