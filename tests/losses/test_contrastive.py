"""Both contrastive losses against loops written from the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import ContrastiveLoss, CrossBatchContrastiveLoss


def slow_batch(z: Tensor, label: Tensor, margin: float, w: Tensor) -> Tensor:
    z = F.normalize(z.double(), dim=1)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        for j in range(len(z)):
            s = z[i] @ z[j]
            if i != j and label[i] == label[j] and s < 1 - 1e-5:
                total = total + w[i] * w[j] * (1 - s)
            elif label[i] != label[j] and s > margin:
                total = total + w[i] * w[j] * s
    return total / w.sum()


def slow_memory(z: Tensor, label: Tensor, m: Tensor, ml: Tensor, margin: float, w: Tensor) -> Tensor:
    z, m = F.normalize(z.double(), dim=1), F.normalize(m.double(), dim=1)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        for j in range(len(m)):
            s = z[i] @ m[j]
            if label[i] == ml[j] and s < 1 - 1e-5:
                total = total + w[i] * (1 - s)
            elif label[i] != ml[j] and s > margin:
                total = total + w[i] * s
    return total / len(z)


def batch(n: int, d: int = 4, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, d, generator=generator)
    return z.to(dtype), torch.randint(0, classes, (n,), generator=generator)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
WEIGHTS = {
    "none": None,
    "mask": torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0, 1, 1]),
    "soft": torch.linspace(0, 1, 10),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("which", list(WEIGHTS))
@pytest.mark.parametrize("margin", [0.5, -1.0, 0.0])
def test_batch_loss_and_gradient_equal_the_loop(dtype, which, margin):
    z, label = batch(10, dtype=dtype)
    w = WEIGHTS[which]
    ones = torch.ones(10).double() if w is None else w.double()
    fast, slow = z.clone().requires_grad_(), z.double().requires_grad_()
    got, want = ContrastiveLoss(margin)(fast, label, w), slow_batch(slow, label, margin, ones)
    got.backward()
    want.backward()
    assert got.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    loose = 1e-2 if dtype is torch.bfloat16 else TOLERANCE[dtype]  # the gradient itself is bf16 then
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("which", list(WEIGHTS))
@pytest.mark.parametrize("block", [1, 70, 2**18])
def test_memory_loss_and_gradient_equal_the_loop(dtype, which, block, monkeypatch):
    monkeypatch.setattr("lightning_nrml.losses.contrastive.CPU_BLOCK", block)
    z, label = batch(10, dtype=dtype)
    m, ml = batch(23, seed=1)
    m[:4], ml[:4] = z[:4].float(), label[:4]  # the anchors themselves are in the memory
    w = WEIGHTS[which]
    ones = torch.ones(10).double() if w is None else w.double()
    fast, slow = z.clone().requires_grad_(), z.double().requires_grad_()
    got = 2 * CrossBatchContrastiveLoss(0.3)(fast, label, m, ml, w)
    want = 2 * slow_memory(slow, label, m, ml, 0.3, ones)
    got.backward()
    want.backward()
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    loose = 1e-2 if dtype is torch.bfloat16 else TOLERANCE[dtype]
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=loose, atol=loose)


def test_closed_form():
    # e1 and a vector at 60 degrees, same class: 2 ordered pairs x (1 - 1/2) / 2 rows
    z = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(0.75)]])
    same, other = torch.tensor([4, 4]), torch.tensor([4, 5])
    assert ContrastiveLoss(0.4)(z, same).item() == pytest.approx(0.5)
    assert ContrastiveLoss(0.4)(z, other).item() == pytest.approx(0.5)
    assert ContrastiveLoss(0.6)(z, other).item() == 0
    # 1 anchor against the same two rows
    assert CrossBatchContrastiveLoss(0.4)(z[:1], same[:1], z, same).item() == pytest.approx(0.5)
    assert CrossBatchContrastiveLoss(0.4)(z[:1], same[:1], z, other).item() == pytest.approx(0.5)
    assert CrossBatchContrastiveLoss(0.6)(z[:1], same[:1], z, other).item() == 0


def test_zero_weights_equal_the_kept_rows_alone():
    z, label = batch(10)
    w = WEIGHTS["mask"]
    kept = w > 0
    m, ml = batch(8, seed=2)
    torch.testing.assert_close(ContrastiveLoss()(z, label, w), ContrastiveLoss()(z[kept], label[kept]))
    # the memory loss is divided by the whole batch
    alone = CrossBatchContrastiveLoss()(z[kept], label[kept], m, ml) * kept.sum() / 10
    torch.testing.assert_close(CrossBatchContrastiveLoss()(z, label, m, ml, w), alone)


def test_large_and_duplicate_rows_do_not_count_as_positives():
    z = torch.tensor([[1e4, 3e4], [1e-4, 3e-4], [1e4, 3e4]])
    label = torch.zeros(3, dtype=torch.int64)
    assert ContrastiveLoss()(z, label).item() == 0
    assert CrossBatchContrastiveLoss()(z, label, z, label).item() == 0


def test_neither_all_but_equal_positives_nor_negatives_at_the_margin_count():
    for cosine, other, counts in (
        (1 - 5e-6, 0, False),
        (1 - 2e-5, 0, True),
        (0.0, 1, False),
        (1e-6, 1, True),
    ):
        z = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
        label = torch.tensor([0, other])
        for loss in (
            ContrastiveLoss(0.0),
            lambda x, y, z=z, y2=label: CrossBatchContrastiveLoss(0.0)(x, y, z, y2),
        ):
            x = z.clone().requires_grad_()
            loss(x, label).backward()
            assert bool(x.grad.any()) == counts


def test_anchor_is_never_its_own_positive_even_if_inexact():
    # a zero row has cosine 0 with itself; only the position tells that it is the same row
    z = torch.zeros(1, 3, requires_grad=True)
    loss = ContrastiveLoss()(z, torch.zeros(1, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert z.grad.abs().sum() == 0


@pytest.mark.parametrize("memory_rows", [0, 6])
def test_empty_memory_gives_zero_attached_to_the_graph(memory_rows):
    z, label = batch(4)
    z.requires_grad_()
    m, ml = batch(memory_rows, seed=3)
    loss = CrossBatchContrastiveLoss()(z, label, m, ml)
    loss.backward()
    assert (loss.item() == 0) == (memory_rows == 0)
    assert z.grad.isfinite().all()
    assert (z.grad.abs().sum() == 0) == (memory_rows == 0)


def test_memory_receives_no_gradient_and_may_change_before_backward():
    z, label = batch(4)
    z.requires_grad_()
    m, ml = batch(9, seed=3)
    m.requires_grad_()
    loss = CrossBatchContrastiveLoss(-1.0)(z, label, m, ml)
    with torch.no_grad():
        m.zero_()
    loss.backward()
    assert m.grad is None
    assert z.grad.abs().sum() > 0


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"'neg_margin'.*1\.5"):
        ContrastiveLoss(1.5)
    with pytest.raises(ValueError, match="'neg_margin'"):
        CrossBatchContrastiveLoss(-2)
    z, label = batch(4)
    with pytest.raises(ValueError, match=r"'memory_embedding' must be \(M, 4\)"):
        CrossBatchContrastiveLoss()(z, label, torch.ones(3, 5), label[:3])
    with pytest.raises(ValueError, match=r"'memory_label' must have shape \(3,\)"):
        CrossBatchContrastiveLoss()(z, label, torch.ones(3, 4), label)


# ---- pairs and samples ----------------------------------------------------------------------------------


def test_pair_weights_are_constants():
    z, label = batch(6)
    pair_weight = torch.ones(6, 6, requires_grad=True)
    ContrastiveLoss(0.0)(z.requires_grad_(), label, None, pair_weight).backward()
    assert pair_weight.grad is None


def test_pair_weights_multiply_the_terms():
    z, label = batch(10, seed=4, dtype=torch.float64)
    z.requires_grad_()
    w, generator = torch.linspace(0, 1, 10).double(), torch.Generator().manual_seed(1)
    pair_weight = torch.rand(10, 10, generator=generator)
    loss = ContrastiveLoss(0.0)
    unit = F.normalize(z.detach(), dim=1)
    total = 0.0
    for i in range(10):
        for j in range(10):
            s = float(unit[i] @ unit[j])
            term = (1 - s) * (s < 1 - 1e-5) if label[i] == label[j] else s * (s > 0)
            total += 0.0 if i == j else float(w[i] * w[j] * pair_weight[i, j]) * term
    value = loss(z, label, w, pair_weight)
    assert value.item() == pytest.approx(total / float(w.sum()), rel=1e-6)
    value.backward()
    assert not z.grad[0].any()  # weight 0
    nothing = loss(z, label, None, torch.zeros(10, 10))
    assert nothing.item() == 0
    assert nothing.grad_fn is not None
    ones = torch.ones(10, 10)
    assert torch.equal(loss(z, label, w, ones), loss(z, label, w))
    with pytest.raises(ValueError, match=r"'pair_weight' must be \(10, 10\)"):
        loss(z, label, None, torch.ones(10, 9))


def test_loss_of_each_sample_adds_up_to_that_of_the_batch():
    z, label = batch(10, seed=5)
    loss = ContrastiveLoss(0.0)
    each = loss.per_sample(z.requires_grad_(), label)
    assert each.shape == (10,)
    assert not each.requires_grad
    torch.testing.assert_close(each.mean(), loss(z, label).detach())
    broken = torch.cat([z.detach(), torch.full((1, 4), torch.nan)])
    got = loss.per_sample(broken, torch.cat([label, label[:1]]))
    torch.testing.assert_close(got[:10], each)
    assert got[10].isnan()
