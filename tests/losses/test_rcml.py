"""RCML: ranking, discrepancy and the joint loss against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_nrml.losses import RCMLLoss
from lightning_nrml.losses.rcml import GroupLasso, flip_suspects, group_lasso, keep_rate, mmd

B, L = 8, 4


def batch(seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    z1, z2 = torch.randn(2, B, L, generator=g, dtype=torch.float64) * 2
    h1, h2 = torch.randn(2, B, 3, 2, 2, generator=g, dtype=torch.float64)
    label = (torch.rand(B, L, generator=g) < 0.4).long()
    label[0] = 0
    return z1, z2, label, h1, h2


def slow_error(p: Tensor, y: Tensor, alpha: float, beta: float) -> float:
    missing, extra = [1e-5] * len(p), [1e-5] * len(p)
    for c in range(len(p)):
        others = [j for j in range(len(p)) if y[j] != y[c]]
        sign = 1 if y[c] == 0 else -1
        square = sum(max(0.0, 2 * sign * float(p[c] - p[j]) + 1) ** 2 for j in others)
        (missing if y[c] == 0 else extra)[c] = math.sqrt(square + 1e-10)
    return alpha * sum(missing) + beta * sum(extra)


def slow_mmd(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(-((i - j) ** 2).sum() / sigma).exp() for i in a for j in b]).mean()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def test_group_lasso_by_hand():
    found = group_lasso(torch.tensor([[0.3, 0.9, 0.8]]), torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(found.missing, torch.tensor([[1e-5, 1e-5, 2.15407]]))
    torch.testing.assert_close(found.extra, torch.tensor([[2.0, 0.8, 1e-5]]))
    assert found.error.item() == pytest.approx(2.670825, abs=1e-4)
    assert found.suspect.item() == 2
    lost = group_lasso(torch.tensor([[0.1, 0.9, 0.2]]), torch.tensor([[1, 1, 0]]))
    assert lost.suspect.item() == 0 or lost.missing[0, 2] > lost.extra[0, 0]
    tie = group_lasso(torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]]))
    assert tie.missing[0, 0].item() == tie.extra[0, 1].item() == 1.0
    assert tie.suspect.item() == 1, "a tie speaks for the extra label"


def test_group_lasso_equals_loops_and_bounds():
    z, _, label, _, _ = batch()
    got = group_lasso(z.sigmoid(), label, 0.3, 0.6).error
    want = [slow_error(p, y, 0.3, 0.6) for p, y in zip(z.sigmoid(), label, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    least = (0.2 + 0.8) * 17 * 1e-5
    label = torch.zeros(3, 17, dtype=torch.long)
    label[1], label[2, :5] = 1, 1
    separated = label * 0.5 + 0.2
    assert group_lasso(separated, label).error.tolist() == pytest.approx([least] * 3, rel=1e-4)
    worst = group_lasso(1.0 - label.float(), label)
    assert worst.missing[2, 16].item() == pytest.approx(3 * math.sqrt(5))
    assert worst.error[2] > worst.error[0]
    known = torch.ones_like(label, dtype=torch.bool)
    known[2, 5:] = False  # without its absent labels nothing contradicts
    assert group_lasso(1.0 - label.float(), label, valid=known).error[2].item() == pytest.approx(
        least, rel=1e-4
    )


def test_mmd_values_and_invariances():
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    assert mmd(zero, one, 1.0).item() == pytest.approx(1.264241, abs=1e-6)
    assert mmd(zero, one, 1e4).item() == pytest.approx(1.99990e-4, rel=1e-5)
    assert mmd(zero, torch.full((1, 1), 1e4), 1.0).item() == 2.0
    _, _, _, x, y = batch()
    assert mmd(x, x, 3.0).item() == 0.0
    flat = [v.flatten(1).clone().requires_grad_() for v in (x, y)]
    slow = slow_mmd(*flat, 3.0)
    slow.backward()
    fast = [v.clone().requires_grad_() for v in (x, y)]
    value = mmd(*fast, 3.0)
    value.backward()
    torch.testing.assert_close(value, slow)
    for got, want in zip(fast, flat, strict=True):
        torch.testing.assert_close(got.grad.flatten(1), want.grad)
    torch.testing.assert_close(mmd(x.flip(0) + 5, y + 5, 3.0), value)
    torch.testing.assert_close(mmd(x.float() + 1000, y.float() + 1000, 3.0), value.float(), rtol=1e-3, atol=0)
    kept = torch.arange(B) < 5
    broken = [torch.where(kept[:, None, None, None], v, math.nan) for v in (x, y)]
    torch.testing.assert_close(mmd(*broken, 3.0, kept), slow_mmd(x[:5].flatten(1), y[:5].flatten(1), 3.0))
    assert mmd(x, y, 3.0, torch.zeros(B, dtype=torch.bool)) == 0


def reference(z1, z2, label, h1, h2, rate, lam2, lam3, sigma, swap=True):
    """Two losses and the gradients that two optimisers would see."""
    orders = []
    for z in (z1, z2):
        error = [slow_error(p, y, 0.2, 0.8) for p, y in zip(z.detach().sigmoid(), label, strict=True)]
        orders.append(sorted(range(B), key=lambda i, e=error: e[i])[: max(1, int(B * rate))])
    chosen = orders[::-1] if swap else orders
    losses, gradients = [], []
    for own in (0, 1):
        leaves = [v.detach().clone().requires_grad_() for v in ((z1, h1), (z2, h2))[own]]
        z, h = leaves
        other_z, other_h = ((z2, h2), (z1, h1))[own]
        total = torch.zeros((), dtype=torch.float64)
        for i in chosen[own]:
            for c in range(L):
                p = z[i, c].sigmoid()
                total = total - (p if label[i, c] else 1 - p).log() / len(chosen[own])
        total = total + lam3 * slow_mmd(z, other_z.detach(), sigma)
        total = total - lam2 * slow_mmd(h.flatten(1), other_h.detach().flatten(1), sigma)
        total.backward()
        losses.append(total.item())
        gradients.append([leaf.grad for leaf in leaves])
    return losses, gradients, chosen


@pytest.mark.parametrize(("rate", "swap"), [(0.6, True), (0.6, False), (1.0, True), (0.05, True)])
def test_joint_loss_equals_two_optimisers(rate, swap):
    for seed in range(20):
        z1, z2, label, h1, h2 = batch(seed)
        losses, gradients, chosen = reference(z1, z2, label, h1, h2, rate, 0.7, 0.4, 5.0, swap)
        if set(chosen[0]) != set(chosen[1]):
            break
    assert rate != 0.6 or set(chosen[0]) != set(chosen[1]), "else a swap shows nowhere"
    leaves = [v.clone().requires_grad_() for v in (z1, z2, h1, h2)]
    loss = RCMLLoss(disparity_weight=0.7, consistency_weight=0.4, sigma=5.0, swap=swap)
    parts = loss.terms(leaves[0], leaves[1], label, leaves[2], leaves[3], rate)
    parts["loss"].backward()
    assert parts["loss_1"].item() == pytest.approx(losses[0])
    assert parts["loss_2"].item() == pytest.approx(losses[1])
    assert parts["loss"].item() == pytest.approx(sum(losses))
    for kept, rows in zip((parts["kept_1"], parts["kept_2"]), chosen, strict=True):
        assert kept.nonzero()[:, 0].tolist() == sorted(rows)
    for network in (0, 1):
        torch.testing.assert_close(leaves[network].grad, gradients[network][0])
        torch.testing.assert_close(leaves[2 + network].grad, gradients[network][1])


def test_laws_of_the_joint_loss():
    z1, z2, label, h1, h2 = batch(1)
    loss = RCMLLoss()
    every = loss.terms(z1, z2, label, h1, h2, 1.0)
    own = RCMLLoss(swap=False).terms(z1, z2, label, h1, h2, 1.0)
    assert torch.equal(every["loss"], own["loss"])
    same = loss.terms(z1, z1.clone(), label, h1, h1.clone(), 0.6)
    assert same["loss_1"] == same["loss_2"]
    assert same["consistency"] == same["disparity"] == 0
    # a dropped sample gets the consistency gradient only
    z = z1.clone().requires_grad_()
    parts = RCMLLoss(disparity_weight=0.0, consistency_weight=0.0).terms(z, z2, label, keep_rate=0.5)
    parts["loss"].backward()
    assert (z.grad[~parts["kept_1"]] == 0).all()
    assert (z.grad[parts["kept_1"]] != 0).all()
    assert parts["kept_1"].sum() == 4


def test_weights():
    z1, z2, label, h1, h2 = batch(2)
    loss = RCMLLoss(sigma=5.0)
    plain = loss(z1, z2, label, h1, h2)
    assert torch.equal(plain, loss(z1, z2, label, h1, h2, weight=torch.ones(B, L)))
    kept = torch.ones(B)
    kept[[1, 5]] = 0
    rows = kept > 0
    want = loss(*(v[rows] for v in (z1, z2, label, h1, h2)))
    broken = [torch.where(rows.view(-1, *[1] * (v.ndim - 1)), v, math.nan) for v in (z1, z2, h1, h2)]
    leaves = [v.requires_grad_() for v in broken]
    got = loss(leaves[0], leaves[1], label, leaves[2], leaves[3], weight=kept)
    got.backward()
    torch.testing.assert_close(got, want)
    assert all((v.grad[~rows] == 0).all() for v in leaves)
    # weights between 0 and 1 weigh the entries of the BCE
    soft = torch.rand(B, L, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    alone = RCMLLoss(consistency_weight=0.0)
    y, parts = label.double(), alone.terms(z1, z2, label, keep_rate=1.0, weight=soft)
    for number, v in ((1, z1), (2, z2)):
        entries = -(y * v.sigmoid().log() + (1 - y) * (-v).sigmoid().log())
        assert parts[f"loss_{number}"].item() == pytest.approx(
            float((entries * soft).sum() / soft.sum() * L), rel=1e-9
        )
    z = z1.clone().requires_grad_()
    nothing = loss(z, z2, label, weight=torch.zeros(B, L))
    nothing.backward()
    assert nothing == 0
    assert (z.grad == 0).all()


def test_keep_rates_of_the_authors():
    down = [keep_rate(e - 1, 100, 1.0, 0.6) for e in (1, 2, 50, 90, 91, 100)]
    assert down == [1.0, 0.99, 0.8, 0.64, 0.6, 0.6]
    up = [keep_rate(e, 20, 0.6, 1.0) for e in range(20)]
    assert up[:2] == [0.6, 0.62]
    assert up[17:] == [0.94, 1.0, 1.0]
    assert {keep_rate(e, 100, 0.6, 0.6) for e in range(100)} == {0.6}
    assert keep_rate(0, 10, 0.29, 0.29) == 0.29  # 100 * .29 = 28.999999999999996


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="sigma"):
        RCMLLoss(sigma=0)
    with pytest.raises(ValueError, match="disparity_weight"):
        RCMLLoss(disparity_weight=-1)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_flipping_equals_a_loop(rate: float) -> None:
    z1, z2, label, *_ = batch(4)
    z2 = z1 + 0.3 * z2  # so that the two often agree
    nets = [group_lasso(z.sigmoid(), label) for z in (z1, z2)]
    candidates = []
    for i in range(B):
        suspects = [int(n.suspect[i]) for n in nets]
        found = [
            max(float(n.missing[i, c]), float(n.extra[i, c])) for n, c in zip(nets, suspects, strict=True)
        ]
        if suspects[0] == suspects[1] and min(found) > 2e-5:
            mean = sum(slow_error(z[i].sigmoid(), label[i], 0.2, 0.8) for z in (z1, z2)) / 2
            candidates.append((mean, i, suspects[0]))
    assert 2 < len(candidates) < B  # the first sample has no label at all
    want = label.clone()
    for _, i, c in sorted(candidates, reverse=True)[: math.ceil(rate * len(candidates) - 1e-9)]:
        want[i, c] = 1 - want[i, c]
    assert torch.equal(flip_suspects(*nets, label, rate), want)
    parts = RCMLLoss(disparity_weight=0.0).terms(z1, z2, label, keep_rate=1.0, flip_rate=rate)
    assert int(parts["flipped"]) == int((want != label).sum())
    plain = RCMLLoss(disparity_weight=0.0).terms(z1, z2, want, keep_rate=1.0)
    assert float(parts["loss"]) == pytest.approx(float(plain["loss"]))


def test_flipping_goes_by_both_networks() -> None:
    def net(*prob: list[float]) -> GroupLasso:
        return group_lasso(torch.tensor(prob), label)

    label = torch.tensor([[0, 1], [0, 1]])
    first = net([0.9, 0.1], [0.8, 0.1])  # alone it would turn the first sample
    second = net([0.6, 0.4], [0.9, 0.0])
    assert first.suspect.tolist() == second.suspect.tolist() == [1, 1]
    assert flip_suspects(first, second, label, 0.5).tolist() == [[0, 1], [0, 0]]
    content = net([0.0, 0.9], [0.0, 0.9])  # finds nothing wrong, and so does not agree
    column = content.suspect.unsqueeze(1)
    assert torch.maximum(content.missing, content.extra).gather(1, column).max() < 2e-5
    for order in ((first, content), (content, first)):
        nets = [GroupLasso(n.error, n.missing, n.extra, torch.ones_like(n.suspect)) for n in order]
        assert torch.equal(flip_suspects(*nets, label, 1.0), label)


def test_labels_of_weight_zero_do_not_count_in_the_ranking() -> None:
    loss = RCMLLoss(disparity_weight=0.0, consistency_weight=0.0)
    for seed in range(5):
        z1, z2, label, *_ = batch(seed)
        weight = torch.ones(B, L)
        weight[:, 2] = 0.0
        label[1, 2] = 1
        rest = torch.tensor([0, 1, 3])
        got = loss.terms(z1, z2, label, keep_rate=0.5, weight=weight)
        want = loss.terms(z1[:, rest], z2[:, rest], label[:, rest], keep_rate=0.5)
        assert torch.equal(got["kept_1"], want["kept_1"])
        assert torch.equal(got["kept_2"], want["kept_2"])


def test_labels_of_weight_zero_are_never_turned() -> None:
    z1, z2, label, *_ = batch(4)
    weight = torch.ones(B, L)
    weight[:, int(group_lasso(z1.sigmoid(), label).suspect[1])] = 0.0
    loss = RCMLLoss(disparity_weight=0.0, consistency_weight=0.0)
    turned = 1 - label
    one, two = (
        loss(z1, z2, torch.where(weight > 0, label, y), keep_rate=1.0, weight=weight, flip_rate=1.0)
        for y in (label, turned)
    )
    assert float(one) == pytest.approx(float(two))
