"""NTXentLoss: closed forms, the formula in float64 with its gradient, weights, panels, precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import NTXentLoss, SupConLoss, ntxent


def pair(n: int, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


def slow(a: Tensor, b: Tensor, t: float, w: Tensor | None = None) -> Tensor:
    """One anchor at a time, from eq. 1."""
    n = len(a)
    z = F.normalize(torch.cat([a, b]).double(), dim=1)
    w = torch.ones(2 * n) if w is None else torch.cat([w, w])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        if w[i] == 0:
            continue
        others = sum(w[j] * torch.exp(z[i] @ z[j] / t) for j in range(2 * n) if j != i)
        total = total + w[i] * (others.log() - z[i] @ z[(i + n) % (2 * n)] / t)
    return total / w.sum()


@pytest.mark.parametrize("n", [1, 2, 4, 33])
def test_equal_rows_give_the_log_of_the_number_of_candidates(n):
    z = torch.ones(n, 3)
    torch.testing.assert_close(NTXentLoss(0.5)(z, z), torch.tensor(math.log(2 * n - 1)), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("n", "t", "want"), [(2, 0.5, 0.239545), (4, 0.5, 0.594438), (256, 0.1, 0.022890)])
def test_orthogonal_images_with_equal_views(n, t, want):
    z = torch.eye(n) * 3
    torch.testing.assert_close(NTXentLoss(t)(z, z), torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [0.5, 0.07, 0.01])
@pytest.mark.parametrize("weight", [None, [1, 0, 1, 1, 0, 1, 1], [0.3, 1, 0.5, 0.01, 0, 0.9, 1]])
def test_value_and_gradient_are_the_formula(t, weight):
    a, b = pair(7)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    want, got = slow(a, b, t, w), NTXentLoss(t)(a, b, w)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for x, y in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("cosine", [-1.0, -0.5, 0.5])
def test_one_pair_that_is_not_alike(cosine):
    """The only other row is the positive: no gradient, also where exp(cos / t) is far below 1."""
    a = torch.tensor([[2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
    loss = NTXentLoss(0.1)(a, b)
    loss.backward()
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    torch.testing.assert_close(a.grad, torch.zeros_like(a), rtol=0, atol=1e-10)


def test_gradcheck():
    w = torch.tensor([1.0, 0.2, 0, 0.7])
    a, b = pair(4, 3)
    assert torch.autograd.gradcheck(lambda x, y: 3 * NTXentLoss(0.3)(x, y, w), (a, b))


@pytest.mark.parametrize("block", [1, 30, 100, 450, 700])
def test_panels_of_every_size_give_the_same(monkeypatch, block):
    a, b = pair(17)
    w = torch.rand(17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = NTXentLoss(0.2)(a, b, w)
    monkeypatch.setattr(ntxent, "CPU_BLOCK", block)
    got = NTXentLoss(0.2)(a, b, w)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for x, y in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)


def test_is_supcon_with_the_image_as_the_class():
    a, b = pair(9)
    w = torch.linspace(0.1, 1, 9, dtype=torch.float64)
    want = SupConLoss(0.2)(torch.cat([a, b]), torch.arange(9).repeat(2), torch.cat([w, w]))
    torch.testing.assert_close(NTXentLoss(0.2)(a, b, w), want)


def test_scale_order_and_views_do_not_matter_and_the_gradient_is_tangential():
    a, b = pair(8)
    loss = NTXentLoss(0.3)
    value = loss(a, b)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    scale = torch.linspace(0.1, 40, 8, dtype=torch.float64)[:, None]
    for other in (loss(b, a), loss(a[order], b[order]), loss(a * scale, b / scale)):
        torch.testing.assert_close(other, value, rtol=1e-12, atol=0)
    for x, g in zip((a, b), torch.autograd.grad(value, (a, b)), strict=True):
        assert (x * g).sum(dim=1).abs().max() < 1e-14
        assert g.norm(dim=1).min() > 1e-3


def test_dropped_images_change_nothing_even_if_they_hold_nan():
    a, b = pair(6)
    w = torch.tensor([1.0, 0, 1, 0, 1, 1])
    kept = w > 0
    want = NTXentLoss()(a[kept], b[kept])
    want_grad = torch.autograd.grad(want, a)[0]
    with torch.no_grad():
        a[1], b[3] = math.nan, math.inf
    got = NTXentLoss()(a, b, w)
    grad_a, grad_b = torch.autograd.grad(got, (a, b))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad_a, want_grad)
    assert (grad_a[~kept] == 0).all()
    assert (grad_b[~kept] == 0).all()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_nothing_kept_is_an_exact_zero(n):
    a, b = pair(n)
    loss = NTXentLoss()(a, b, torch.zeros(n))
    loss.backward()
    assert loss == 0
    assert (a.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [0.5, 0.05, 0.02])
def test_half_precision_input_gives_the_fp32_loss(dtype, t):
    a, b = (x.detach().to(dtype).requires_grad_() for x in pair(9))
    want = NTXentLoss(t)(a.float(), b.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = NTXentLoss(t)(a, b)
        got.backward()
    assert got.dtype is torch.float32
    assert torch.equal(got, want)
    assert a.grad.dtype is dtype
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("t", [0.03, 0.029, 0.003])
def test_opposite_rows_at_a_small_temperature(t):
    """All negatives at cosine 1 and the positive at -1: the largest loss there is, 2 / T + log(2)."""
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    a = one.clone().requires_grad_()
    loss = NTXentLoss(t)(a, -one)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(2 / t + math.log(2)), rtol=1e-6, atol=0)
    assert a.grad.isfinite().all()


def test_without_gradient_the_value_is_the_same():
    a, b = pair(5)
    with torch.no_grad():
        got = NTXentLoss()(a, b)
    assert not got.requires_grad
    assert torch.equal(got, NTXentLoss()(a, b).detach())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"'temperature' must be at least 0\.003, got 0\.0"):
        NTXentLoss(0.0)
    with pytest.raises(ValueError, match=r"same shape \(B, D\), got \(4, 6\) and \(3, 6\)"):
        NTXentLoss()(pair(4)[0], pair(3)[0])
    with pytest.raises(ValueError, match=r"'weight' must have shape \(4,\), one per pair, got \(8,\)"):
        NTXentLoss()(*pair(4), torch.ones(8))
