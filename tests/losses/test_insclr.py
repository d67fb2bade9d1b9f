"""InsCLRLoss: closed forms of the card, the formula in float64 with both gradients, blocks, weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import InsCLRLoss, insclr


def two(cosine: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([[2.0, 0.0]]), torch.tensor([[cosine, math.sqrt(1 - cosine**2)]]) * 3


def batch(rows: int = 6, memory: int = 31) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (rows, memory))
    x2[:3] = 2 * x1[:3]  # some pairs are the same feature
    y1 = torch.tensor([1, 2, -1, 1, -2, 3])[:rows]
    y2 = torch.randint(-2, 4, (memory,), generator=g)
    y2[0] = y1[0]
    return x1.requires_grad_(), y1, x2.requires_grad_(), y2


def slow(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, margin: float, w1: Tensor, w2: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x1)):
        for j in range(len(x2)):
            s = F.normalize(x1[i], dim=0) @ F.normalize(x2[j], dim=0)
            if y1[i] == y2[j] and s < 1 - 1e-6:
                total = total + w1[i] * w2[j] * (1 - s)
            if y1[i] != y2[j] and s > margin:
                total = total + w1[i] * w2[j] * s
    return total / w1.sum()


@pytest.mark.parametrize(
    ("cosine", "same", "want"), [(0.5, False, 0.5), (0.39, False, 0.0), (0.9, True, 0.1), (-1.0, True, 2.0)]
)
def test_closed_forms(cosine, same, want):
    a, b = two(cosine)
    y = torch.tensor([1])
    got = InsCLRLoss()(a, y, b, y if same else y + 1)
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6)


def test_identical_rows_of_a_class_are_no_pair_and_the_loss_jumps_by_the_margin():
    a, _ = two(0.0)
    y = torch.tensor([1])
    x = a.clone().requires_grad_()
    loss = InsCLRLoss()(x, y, a, y)
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()
    below, above = (InsCLRLoss(0.4)(a, y, two(c)[1], y + 1).item() for c in (0.3999, 0.4001))
    assert below == 0
    # a negative at the margin does not count either, nor a positive that is all but the same
    InsCLRLoss(0.0)(x, y, two(0.0)[1], y + 1).backward()
    InsCLRLoss()(x, y, two(1 - 5e-7)[1], y).backward()
    assert (x.grad == 0).all()
    assert above == pytest.approx(0.4001, abs=1e-6)


@pytest.mark.parametrize("margin", [0.4, -0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_value_and_both_gradients_are_the_formula(monkeypatch, margin, weighted, block):
    monkeypatch.setattr(insclr, "CPU_BLOCK", block)
    x1, y1, x2, y2 = batch()
    g = torch.Generator().manual_seed(5)
    w1, w2 = (torch.rand(len(x), generator=g, dtype=torch.float64) for x in (x1, x2))
    w1[4], w2[7] = 0, 0
    if not weighted:
        w1, w2 = torch.ones_like(w1), torch.ones_like(w2)
    got = InsCLRLoss(margin)(x1, y1, x2, y2, *([w1, w2] if weighted else []))
    want = slow(x1, y1, x2, y2, margin, w1, w2)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (x1, x2)), torch.autograd.grad(want, (x1, x2)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_with_the_batch_as_both_sides():
    x1, y1, _, _ = batch()
    assert torch.autograd.gradcheck(lambda x: 2 * InsCLRLoss()(x, y1, x, y1), x1)


def test_a_memory_without_gradient_gets_none():
    x1, y1, x2, y2 = batch()
    want = torch.autograd.grad(InsCLRLoss()(x1, y1, x2, y2), x1)[0]
    bank = x2.detach()
    got = torch.autograd.grad(InsCLRLoss()(x1, y1, bank, y2), x1)[0]
    assert torch.equal(got, want)
    assert bank.grad is None
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(InsCLRLoss()(x1, y1, bank[order], y2[order]), InsCLRLoss()(x1, y1, bank, y2))


def test_weight_zero_is_leaving_the_row_out_even_if_it_holds_nan():
    x1, y1, x2, y2 = batch()
    w = (y1 > 0).double()
    want = InsCLRLoss()(x1[y1 > 0], y1[y1 > 0], x2, y2)
    with torch.no_grad():
        x1[y1 <= 0] = math.nan
    got = InsCLRLoss()(x1, y1, x2, y2, w)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got, x1)
    assert (grad[y1 <= 0] == 0).all()
    assert grad.isfinite().all()


def test_nothing_to_compare_is_an_exact_zero():
    x1, y1, x2, y2 = batch()
    for loss in (
        InsCLRLoss()(x1, y1, x2[:0], y2[:0]),
        InsCLRLoss()(x1[:0], y1[:0], x2, y2),
        InsCLRLoss()(x1, y1, x2, y2, torch.zeros(6)),
        InsCLRLoss()(x1, y1, x2, y2, None, torch.zeros(31)),
    ):
        assert loss == 0
        assert (torch.autograd.grad(loss, x1)[0] == 0).all()


def test_half_precision_and_autocast_give_the_fp32_loss():
    x1, y1, x2, y2 = batch()
    x1, x2 = x1.detach().bfloat16(), x2.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = InsCLRLoss()(x1, y1, x2, y2)
    assert got.dtype is torch.float32
    assert torch.equal(got, InsCLRLoss()(x1.float(), y1, x2.float(), y2))


def test_a_memory_in_float32_serves_float64_rows():
    x1, y1, x2, y2 = batch()
    bank = x2.detach().float()
    got = InsCLRLoss()(x1, y1, bank, y2)
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, InsCLRLoss()(x1, y1, bank.double(), y2))


def test_wrong_arguments_are_named():
    x1, y1, x2, y2 = batch()
    with pytest.raises(ValueError, match=r"'x2' must be \(M, 3\) like 'x1', got shape \(31, 2\)"):
        InsCLRLoss()(x1, y1, x2[:, :2], y2)
    with pytest.raises(ValueError, match=r"'y1' must have shape \(6,\), got \(5,\)"):
        InsCLRLoss()(x1, y1[:5], x2, y2)
    with pytest.raises(ValueError, match=r"'y2' must have shape \(31,\), got \(4,\)"):
        InsCLRLoss()(x1, y1, x2, y2[:4])
    with pytest.raises(ValueError, match=r"'margin' is a cosine and must lie in \[-1, 1\], got 1\.4"):
        InsCLRLoss(1.4)
