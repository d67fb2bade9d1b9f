"""Multi-label losses: closed forms, slow references (value and gradient), memory, weights."""

from __future__ import annotations

import math

import pytest
import torch
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml.losses import (
    MultiLabelASLLoss,
    MultiLabelBCELoss,
    MultiLabelELRLoss,
    MultiLabelJoCoRLoss,
    MultiLabelSATLoss,
)
from lightning_nrml.losses.multilabel import keep_smallest

N, B, L = 9, 6, 4
TOL = {"rtol": 1e-5, "atol": 1e-7}


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B, L, generator=g, dtype=torch.float64) * 2
    label = (torch.rand(B, L, generator=g) < 0.4).long()
    return z, label, torch.randperm(N, generator=g)[:B]


def run(loss: nn.Module, z: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = loss(z, *args, **kwargs)
    value.backward()
    return value.detach(), z.grad


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(p: float, y: float) -> float:
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


def test_elr_closed_form():
    loss = MultiLabelELRLoss(1, 1)
    value, grad = run(loss, torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1), torch.zeros(1).long())
    assert loss.target.item() == pytest.approx(0.15)
    assert value.item() == pytest.approx(0.4592626, abs=1e-6)
    assert grad.item() == pytest.approx(-0.6216216, abs=1e-6)


def test_sat_closed_form():
    loss = MultiLabelSATLoss(1, 1, 0.9, warmup_epochs=1)
    z, y, i = torch.full((1, 1), 2.0, dtype=torch.float64), torch.ones(1, 1), torch.zeros(1).long()
    assert run(loss, z, y, i, epoch=0)[0].item() == pytest.approx(math.log1p(math.exp(-2)))
    assert loss.target.isnan().all(), "the warm-up leaves the targets alone"
    value, grad = run(loss, z, y, i, epoch=1)
    assert loss.target.item() == pytest.approx(0.98807971, abs=1e-7)
    assert value.item() == pytest.approx(0.15076860, abs=1e-6)
    assert grad.item() == pytest.approx(-0.10728263, abs=1e-6)


@pytest.mark.parametrize("kind", [MultiLabelELRLoss, MultiLabelSATLoss])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_positions_may_be_any_integers(kind, dtype):
    z, label, index = batch()
    one, two = (kind(N, L, **({"warmup_epochs": 0} if kind is MultiLabelSATLoss else {})) for _ in range(2))
    assert torch.equal(one(z, label, index), two(z, label, index.to(dtype)))
    torch.testing.assert_close(one.target, two.target, rtol=0, atol=0, equal_nan=True)


def test_jocor_closed_form():
    z1, z2 = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
    assert MultiLabelJoCoRLoss(0.1)(z1, z2, torch.ones(1, 1)).item() == pytest.approx(0.8142271, abs=1e-6)
    assert MultiLabelJoCoRLoss(1.0)(z1, z2, torch.ones(1, 1)).item() == pytest.approx(0.7615942, abs=1e-6)
    assert MultiLabelJoCoRLoss(0.0)(z1, z2, torch.ones(1, 1)).item() == pytest.approx(0.8200752, abs=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_elr_equals_loops(symmetric):
    lam, beta = 2.0, 0.6
    loss = MultiLabelELRLoss(N, L, lam, beta, symmetric)
    table = [[0.0] * L for _ in range(N)]
    for visit in range(4):
        z, label, index = batch(visit)
        value, grad = run(loss, z, label, index)
        want, want_grad = 0.0, torch.zeros(B, L, dtype=torch.float64)
        for i in range(B):
            for c in range(L):
                p, y = sigmoid(z[i, c]), label[i, c].item()
                t = table[index[i]][c] = beta * table[index[i]][c] + (1 - beta) * p
                agree = t * p + (1 - t) * (1 - p) if symmetric else t * p
                slope = (2 * t - 1 if symmetric else t) * p * (1 - p)
                want += (bce(p, y) + lam * math.log(1 - agree)) / (B * L)
                want_grad[i, c] = (p - y - lam * slope / (1 - agree)) / (B * L)
        torch.testing.assert_close(value.item(), want, **TOL)
        torch.testing.assert_close(grad, want_grad, **TOL)
    torch.testing.assert_close(loss.target, torch.tensor(table), **TOL)


def test_elr_limits():
    z, label, index = batch()
    plain = run(MultiLabelBCELoss(), z, label)
    for loss in (MultiLabelELRLoss(N, L, lam=0.0), MultiLabelELRLoss(N, L, beta=1.0)):
        got = run(loss, z, label, index)
        assert torch.equal(got[0], plain[0])
        torch.testing.assert_close(got[1], plain[1])
    loss = MultiLabelELRLoss(N, L, lam=3.0, beta=0.0)
    p = z.sigmoid()
    torch.testing.assert_close(loss(z, label, index), plain[0] + 3 * (1 - p**2).log().mean(), **TOL)
    torch.testing.assert_close(loss.target[index], p.float())
    _, grad = run(MultiLabelELRLoss(N, L), z, label, index)
    assert (grad <= plain[1]).all(), "it only pushes up"
    extreme = run(MultiLabelELRLoss(N, L, beta=0.0), torch.full((B, L), 90.0), torch.ones(B, L), index)[0]
    assert extreme.item() == pytest.approx(3 * math.log(1 - (1 - 1e-4) ** 2), rel=1e-3)


def test_sat_equals_loops():
    a = 0.8
    loss = MultiLabelSATLoss(N, L, a, warmup_epochs=1)
    table: dict[int, list[float]] = {}
    for visit in range(5):
        z, _, index = batch(visit)
        label = (torch.arange(N * L).view(N, L) % 3 == 0).long()[index]
        value, grad = run(loss, z, label, index, epoch=visit)
        want, want_grad = 0.0, torch.zeros(B, L, dtype=torch.float64)
        for i in range(B):
            row = table.setdefault(int(index[i]), label[i].tolist())
            for c in range(L):
                p = sigmoid(z[i, c])
                if visit >= 1:
                    row[c] = a * row[c] + (1 - a) * p
                want += bce(p, row[c]) / (B * L)
                want_grad[i, c] = (p - row[c]) / (B * L)
        torch.testing.assert_close(value.item(), want, **TOL)
        torch.testing.assert_close(grad, want_grad, **TOL)
        if visit == 0:
            table = {}


def test_sat_limits_and_correction():
    z, label, index = batch()
    plain = run(MultiLabelBCELoss(), z, label)
    warm = run(MultiLabelSATLoss(N, L, warmup_epochs=3), z, label, index, epoch=2)
    assert torch.equal(warm[0], plain[0])
    assert torch.equal(warm[1], plain[1])
    fixed = run(MultiLabelSATLoss(N, L, 1.0, 0), z, label, index, epoch=7)
    torch.testing.assert_close(fixed, plain, **TOL)
    free, grad = run(MultiLabelSATLoss(N, L, 0.0, 0), z, label, index)
    p = z.sigmoid()
    torch.testing.assert_close(free, F.binary_cross_entropy(p, p), **TOL)
    assert grad.abs().max() < 1e-8
    loss, z = MultiLabelSATLoss(2, 1, 0.9, 0), torch.full((1, 1), math.log(0.1 / 0.9))
    given = torch.ones(2, 1, dtype=torch.long)
    for visit in range(1, 9):
        loss(z, given[:1], torch.zeros(1).long())
        assert loss.target[0].item() == pytest.approx(0.9**visit + (1 - 0.9**visit) * 0.1, abs=1e-6)
        assert loss.corrected(given).flatten().tolist() == [int(visit < 8), 1], "8 visits, as on paper"


@pytest.mark.parametrize("make", [lambda: MultiLabelELRLoss(N, L), lambda: MultiLabelSATLoss(N, L, 0.9, 0)])
def test_memory_rules(make):
    z, label, index = batch()
    loss = make()
    before = loss.target.clone()
    loss.eval()
    loss(z, label, index)
    assert torch.equal(before.nan_to_num(9), loss.target.nan_to_num(9)), "validation never writes"
    loss.train()
    loss(z, label, index)
    others = torch.ones(N, dtype=torch.bool)
    others[index] = False
    assert torch.equal(before[others].nan_to_num(9), loss.target[others].nan_to_num(9))
    assert not torch.equal(before[index].nan_to_num(9), loss.target[index].nan_to_num(9))
    # of two rows of a sample the last one counts, in any order on the device
    twice, last = make(), make()
    twice(z, label, torch.tensor([0, 1, 2, 3, 4, 0]))
    last(z[1:], label[1:], torch.tensor([1, 2, 3, 4, 0]))
    assert torch.equal(twice.target.nan_to_num(9), last.target.nan_to_num(9))
    # unless it is dropped
    twice, first = make(), make()
    kept = torch.tensor([1.0, 1, 1, 1, 1, 0])
    twice(z, label, torch.tensor([0, 1, 2, 3, 4, 0]), kept)
    first(z[:5], label[:5], torch.tensor([0, 1, 2, 3, 4]))
    assert torch.equal(twice.target.nan_to_num(9), first.target.nan_to_num(9))
    # a row of which one entry is dropped is still the last one
    part = torch.ones(B, L)
    part[5, 0] = 0
    twice, last = make(), make()
    twice(z, label, torch.tensor([0, 1, 2, 3, 4, 0]), part)
    last(z[1:], label[1:], torch.tensor([1, 2, 3, 4, 0]), part[1:])
    assert torch.equal(twice.target.nan_to_num(9), last.target.nan_to_num(9))
    # an entry without a finite prediction keeps what it holds
    broken = z.clone()
    broken[2, 1] = math.nan
    old = loss.target[index[2], 1].item()
    loss(broken, label, index)
    assert loss.target[index[2], 1].item() == old
    assert loss.target[index].isfinite().all()
    # a fresh loss takes its size from the checkpoint; another size is refused
    fresh = type(loss)(0, L)
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.target.nan_to_num(9), loss.target.nan_to_num(9))
    fresh.allocate(N)
    for size in (N - 1, N + 1):
        with pytest.raises(ValueError, match="remembers 9 samples"):
            fresh.allocate(size)
    assert loss.half().target.dtype is torch.float32
    moved = type(loss)(0, L).to("meta")
    moved.allocate(N)
    assert moved.target.device.type == "meta"
    with pytest.raises(IndexError, match="dataset index 9"):
        loss(z, label, torch.full((B,), N))


LOSSES = {
    "bce": MultiLabelBCELoss,
    "asl": MultiLabelASLLoss,
    "elr": lambda: MultiLabelELRLoss(N, L),
    "sat": lambda: MultiLabelSATLoss(N, L, 0.9, 0),
    "jocor": lambda: Both(MultiLabelJoCoRLoss(forget_rate=0.0)),
    "jocor-entry": lambda: Both(MultiLabelJoCoRLoss(forget_rate=0.0, choose="entry")),
}


class Both(nn.Module):
    """JoCoR with a second network that gives half of the first one's logits."""

    def __init__(self, loss: MultiLabelJoCoRLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, z, label, index, weight=None):
        return self.loss(z, 0.5 * z, label, weight)


EVERY = pytest.mark.parametrize("name", LOSSES)


@EVERY
def test_dropped_entries_take_no_part_even_if_they_hold_nan(name):
    z, label, index = batch()
    w = torch.ones(B, L)
    w[0], w[3, 1], w[4, 2] = 0.0, 0.0, math.nan
    kept = w > 0
    rows = kept.all(dim=1)
    clean, grad = run(LOSSES[name](), z, label, index, w)
    bad, unknown = z.clone(), label.double()
    bad[~kept] = unknown[~kept] = math.nan
    value, bad_grad = run(LOSSES[name](), bad, unknown, index, w)
    torch.testing.assert_close(value, clean)
    torch.testing.assert_close(bad_grad, grad)
    assert (bad_grad[~kept] == 0).all()
    assert (bad_grad[kept] != 0).float().mean() > 0.8, "a clipped negative of ASL has none"
    # whole rows: the same as a batch without them
    want, want_grad = run(LOSSES[name](), z[rows], label[rows], index[rows])
    value, grad = run(LOSSES[name](), z, label, index, rows.float())
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad[rows], want_grad)


@EVERY
def test_all_dropped_and_precision(name):
    z, label, index = batch()
    loss = LOSSES[name]()
    value, grad = run(loss, z, label, index, torch.zeros(B, L))
    assert value.item() == 0
    assert (grad == 0).all()
    if hasattr(loss, "target"):
        assert (loss.target.nan_to_num(0) == 0).all(), "dropped entries are not remembered"
    half = z.bfloat16()
    want = LOSSES[name]()(half.float(), label, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = LOSSES[name]()(half, label, index)
    assert got.dtype is torch.float32
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="must both be"):
        loss(z, label[:, :2], index)
    with pytest.raises(ValueError, match="'weight' must be"):
        loss(z, label, index, torch.ones(L + 1))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("positive", [True, False])
def test_asl_has_the_formulas_gradient_up_to_a_certain_entry(gamma, positive):
    """(1 - q)^gamma has an infinite slope at q = 1 below gamma = 1, the product with log q has none."""
    options = {"gamma_pos": gamma, "gamma_neg": gamma, "clip": 0.0}
    sign = 1.0 if positive else -1.0
    label = torch.full((1, 7), int(positive))
    z = sign * torch.tensor([[-5.0, 0.0, 5.0, 20.0, 40.0, 100.0, 800.0]])
    wide = z.double().requires_grad_()
    right, wrong = (sign * wide).sigmoid(), (-sign * wide).sigmoid()
    (-(wrong**gamma) * right.log()).mean().backward()
    want = torch.where(z.abs() < 100, wide.grad, 0.0)  # wrong of 800 is 0 in float64, too
    for dtype in (torch.float32, torch.float64):
        _, grad = run(MultiLabelASLLoss(**options), z.to(dtype), label)
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-5)
        assert (grad[0, -2:] == 0).all()


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_asl_takes_its_exponents_as_they_are(default):
    z, label, _ = batch()
    torch.set_default_dtype(default)
    try:
        got = MultiLabelASLLoss(1.3, 0.7, 0.03)(z, label)
    finally:
        torch.set_default_dtype(torch.float32)
    want = 0.0
    for p, y in zip(z.sigmoid().flatten().tolist(), label.flatten().tolist(), strict=True):
        right, gamma = (p, 0.7) if y else (min(1 - p + 0.03, 1.0), 1.3)
        want -= (1 - right) ** gamma * math.log(right) / (B * L)
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_asl_of_a_certain_wrong_answer_is_finite():
    value, grad = run(MultiLabelASLLoss(), torch.tensor([[-200.0]]), torch.ones(1, 1))
    assert value.item() == pytest.approx(-math.log(1e-8))
    assert grad.isfinite().all()


def test_asl_equals_timm():
    z, label, _ = batch()
    z = z.float()  # timm knows no other type
    for gammas in ((4.0, 1.0, 0.05), (2.0, 0.0, 0.0)):
        theirs = AsymmetricLossMultiLabel(*gammas)
        scale = L if getattr(theirs, "reduction", "sum") == "batchmean" else B * L  # older ones sum
        value, grad = run(MultiLabelASLLoss(*gammas), z, label)
        want, want_grad = run(theirs, z, label.float())
        torch.testing.assert_close(value * scale, want, **TOL)
        torch.testing.assert_close(grad * scale, want_grad, **TOL)


@pytest.mark.parametrize("choose", ["sample", "entry"])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9])
def test_jocor_equals_loops(choose, rate):
    (z1, label, _), (z2, _, _) = batch(1), batch(2)
    k = 0.3
    loss = MultiLabelJoCoRLoss(k, rate, choose=choose)
    cost = torch.zeros(B, L, dtype=torch.float64)
    slope = torch.zeros(2, B, L, dtype=torch.float64)
    for i in range(B):
        for c in range(L):
            p, q, y = sigmoid(z1[i, c]), sigmoid(z2[i, c]), label[i, c].item()
            kl = sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q), (q, p), (1 - q, 1 - p)))
            cost[i, c] = (1 - k) * (bce(p, y) + bce(q, y)) + k * kl
            gap, dz = p - q, (z1[i, c] - z2[i, c]).item()
            slope[0, i, c] = (1 - k) * (p - y) + k * (p * (1 - p) * dz + gap)
            slope[1, i, c] = (1 - k) * (q - y) - k * (q * (1 - q) * dz + gap)
    kept = torch.zeros(B, L, dtype=torch.bool)
    if choose == "sample":
        kept[cost.sum(1).argsort()[: max(1, int((1 - rate) * B))]] = True
    else:
        kept.view(-1)[cost.flatten().argsort()[: max(1, int((1 - rate) * B * L))]] = True
    z1, z2 = z1.requires_grad_(), z2.requires_grad_()
    value, got_kept = loss.terms(z1, z2, label)
    value.backward()
    assert torch.equal(got_kept, kept)
    torch.testing.assert_close(value.item(), cost[kept].mean().item(), **TOL)
    torch.testing.assert_close(torch.stack([z1.grad, z2.grad]), slope * kept / kept.sum(), **TOL)


def test_jocor_ranks_samples_by_the_weighted_mean_of_their_entries():
    (z1, label, _), (z2, _, _) = batch(1), batch(2)
    w = torch.rand(B, L, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cost = torch.stack(
        [
            MultiLabelJoCoRLoss(0.3, 0.0)(z1[i : i + 1], z2[i : i + 1], label[i : i + 1], w[i : i + 1])
            for i in range(B)
        ]
    )
    loss, kept = MultiLabelJoCoRLoss(0.3, 0.5).terms(z1, z2, label, w)
    chosen = cost.argsort()[: B // 2]
    assert kept.all(dim=1).nonzero().flatten().tolist() == sorted(chosen.tolist())
    mass = w.sum(dim=1)[chosen]
    torch.testing.assert_close(loss, (cost[chosen] * mass).sum() / mass.sum(), **TOL)


def test_jocor_chooses_samples_by_mean_and_not_by_sum():
    z = torch.tensor([[-4.0, 0, 0, 0], [-3, -3, -3, -3]])  # present labels: the further below 0, the dearer
    w = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    _, kept = MultiLabelJoCoRLoss(forget_rate=0.5).terms(z, z, torch.ones(2, 4), w)
    assert kept.tolist() == [[False] * 4, [True] * 4], "a mean of 7.2 against 5.5, a sum of 7.2 against 22"
    _, kept = MultiLabelJoCoRLoss(forget_rate=0.0).terms(z, z, torch.ones(2, 4), w)
    assert torch.equal(kept, w > 0), "what has weight 0 is not kept"
    # doubts about a whole sample, which weigh all of its labels down, make it no cheaper
    w = torch.tensor([[0.1, 0, 0, 0], [1, 1, 1, 1]])
    _, kept = MultiLabelJoCoRLoss(forget_rate=0.5).terms(z, z, torch.ones(2, 4), w)
    assert kept.tolist() == [[False] * 4, [True] * 4]


def test_jocor_takes_its_share_of_the_samples_that_have_weight():
    z = torch.tensor([[-3.0], [-2.0], [5.0], [5.0]])
    w = torch.tensor([1.0, 1.0, 0.0, 0.0])
    _, kept = MultiLabelJoCoRLoss(forget_rate=0.5).terms(z, z, torch.ones(4, 1), w)
    assert kept.flatten().tolist() == [False, True, False, False]


def test_jocor_takes_its_share_of_the_entries_that_have_weight():
    z = torch.tensor([[-3.0, -2.0, 5.0, 5.0]])
    w = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    _, kept = MultiLabelJoCoRLoss(forget_rate=0.5, choose="entry").terms(z, z, torch.ones(1, 4), w)
    assert kept.tolist() == [[False, True, False, False]]


def test_keep_smallest_counts_exactly_and_never_keeps_what_may_not_be_chosen():
    value, every = torch.arange(20.0), torch.ones(20, dtype=torch.bool)
    assert keep_smallest(value, every, 1 - 0.9).sum() == 2, "of 1.9999999999999996"
    assert keep_smallest(value[:10], every[:10], 0.1 + 0.2, upwards=True).sum() == 3, "of 3.0000000000000004"
    assert keep_smallest(value[:10], every[:10], 0.31, upwards=True).sum() == 4
    assert not keep_smallest(value, ~every, 0.5).any()


def test_jocor_laws():
    (z1, label, _), (z2, _, _) = batch(1), batch(2)
    agree = MultiLabelJoCoRLoss(1.0, 0.0)
    assert run(agree, z1, z1.clone(), label)[0] == 0
    assert torch.equal(agree(z1, z2, label), agree(z2, z1, label))
    torch.testing.assert_close(agree(-z1, -z2, label), agree(z1, z2, label))
    torch.testing.assert_close(agree(z1, z2, 1 - label), agree(z1, z2, label), msg="no label enters at k = 1")
    # the single-label form with the classes absent and present
    two = [torch.stack([torch.zeros_like(z[:, 0]), z[:, 0]], 1).log_softmax(1) for z in (z1, z2)]
    kl = sum(F.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in (two, two[::-1]))
    ce = sum(F.nll_loss(a, label[:, 0]) for a in two)
    got = MultiLabelJoCoRLoss(0.4, 0.0)(z1[:, :1], z2[:, :1], label[:, :1])
    torch.testing.assert_close(got, 0.6 * ce + 0.4 * kl)
    values, kept = [], []
    for rate in (0.0, 0.3, 0.6, 0.9):
        value, rows = MultiLabelJoCoRLoss().terms(z1, z2, label, forget_rate=rate)
        values.append(value.item())
        kept.append(set(rows.nonzero()[:, 0].tolist()))
    assert values == sorted(values, reverse=True)
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert len(kept[3]) == 1


def test_jocor_schedule():
    loss = MultiLabelJoCoRLoss(forget_rate=0.4, ramp_epochs=5, exponent=2.0)
    assert [round(loss.rate(e), 4) for e in range(7)] == [0, 0.04, 0.08, 0.12, 0.16, 0.4, 0.4]
    assert MultiLabelJoCoRLoss(forget_rate=0.4, ramp_epochs=1).rate(0) == 0


def test_bad_arguments_are_named():
    for call, word in {
        lambda: MultiLabelELRLoss(N, L, lam=-1): "lam",
        lambda: MultiLabelELRLoss(N, 0): "num_labels",
        lambda: MultiLabelSATLoss(N, L, momentum=2): "momentum",
        lambda: MultiLabelSATLoss(N, L, warmup_epochs=-1): "warmup_epochs",
        lambda: MultiLabelJoCoRLoss(co_lambda=2): "co_lambda",
        lambda: MultiLabelJoCoRLoss(forget_rate=1.0): "forget_rate",
        lambda: MultiLabelJoCoRLoss(ramp_epochs=0): "ramp_epochs",
        lambda: MultiLabelJoCoRLoss(choose="label"): "choose",
        lambda: MultiLabelASLLoss(gamma_neg=-1): "gamma_neg",
        lambda: MultiLabelASLLoss(clip=1.0): "clip",
    }.items():
        with pytest.raises(ValueError, match=word):
            call()
