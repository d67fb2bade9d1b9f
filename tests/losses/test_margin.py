"""Margin loss: closed forms, a slow loop and pytorch-metric-learning on the same triplets."""

from __future__ import annotations

import pytest
import torch
from margin_rows import at_distances, batch, seeded
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import DistanceWeightedMiner, MarginLoss

Triplets = tuple[Tensor, Tensor, Tensor]


def triangle(positive: float, negative: float) -> tuple[Tensor, Tensor, Triplets]:
    rows = tuple(torch.tensor([i]) for i in range(3))
    return at_distances([positive, negative], 3), torch.tensor([0, 0, 1]), rows  # type: ignore[return-value]


def test_closed_forms():
    z, label, triplets = triangle(1.2, 1.2)
    loss = MarginLoss().double()
    value = loss(z, label, triplets=triplets)
    value.backward()
    assert value.item() == pytest.approx(0.2, abs=1e-7)
    assert loss.beta.grad.item() == 0
    assert MarginLoss(nu=0.5)(z, label, triplets=triplets).item() == pytest.approx(
        0.2 + 0.5 * 1.2 / 2, abs=1e-6
    )
    z, label, triplets = triangle(1.1, 1.5)  # only the positive counts
    assert MarginLoss()(z, label, triplets=triplets).item() == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("nu", [0.0, 1.0])
def test_satisfied_triplets_give_an_exact_zero(nu):
    z, label, triplets = triangle(0.99, 1.41)
    loss, z = MarginLoss(nu=nu), z.requires_grad_()
    value = loss(z, label, triplets=triplets)
    value.backward()
    assert value.item() == 0
    assert (z.grad == 0).all()
    assert loss.beta.grad.item() == 0


def test_equal_rows_have_a_finite_gradient():
    z = torch.ones(3, 4, requires_grad=True)
    loss = MarginLoss(beta=0.1)
    loss(z, torch.tensor([0, 0, 1]), triplets=tuple(torch.tensor([i]) for i in range(3))).backward()
    assert z.grad.isfinite().all()


def slow(z: Tensor, label: Tensor, beta: Tensor, w: Tensor, triplets: Triplets, margin: float, nu: float):
    z = F.normalize(z, dim=1)
    total, number = z.sum() * 0, 0.0
    for a, p, n in zip(*(x.tolist() for x in triplets), strict=True):
        b = beta[label[a]] if len(beta) > 1 else beta[0]
        pull = (z[a] - z[p]).norm() - b + margin
        push = b - (z[a] - z[n]).norm() + margin
        share = float(w[a] * w[p] * w[n])
        total = total + share * (pull.clamp(min=0) + push.clamp(min=0) + nu * b)
        number += share * (bool(pull > 0) + bool(push > 0))
    return total / number


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [None, "mask", "soft"])
@pytest.mark.parametrize(("classes", "nu"), [(None, 0.0), (4, 0.1)])
def test_value_and_gradients_equal_the_loop(dtype, weighted, classes, nu):
    z, label = batch()
    z = z.to(dtype)
    soft = torch.rand(20, generator=seeded(7))
    w = {None: None, "mask": (soft > 0.3).float(), "soft": soft * (soft > 0.2)}[weighted]
    triplets = DistanceWeightedMiner()(z, label, None, seeded(1))
    loss = MarginLoss(0.15, 1.1, nu, classes).to(dtype)
    with torch.no_grad():
        loss.beta.add_(0.1 * torch.randn(len(loss.beta), generator=seeded(8)).to(dtype))
    fast, reference = z.clone().requires_grad_(), z.double().requires_grad_()
    beta = loss.beta.detach().double().requires_grad_()
    ones = torch.ones(20) if w is None else w
    got = loss(fast, label, w, triplets=triplets)
    want = slow(reference, label, beta, ones.double(), triplets, 0.15, nu)
    got.backward()
    want.backward()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(loss.beta.grad.double(), beta.grad, rtol=tolerance, atol=tolerance)
    if w is not None:
        assert (fast.grad[w == 0] == 0).all()


@pytest.mark.parametrize(("classes", "nu"), [(None, 0.0), (4, 0.0), (4, 0.2)])
def test_agrees_with_pytorch_metric_learning_on_the_same_triplets(classes, nu):
    from pytorch_metric_learning.losses import MarginLoss as Peer

    z, label = batch(seed=5)
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    triplets = DistanceWeightedMiner()(z, label, None, seeded(2))
    loss, peer = MarginLoss(0.2, 1.15, nu, classes), Peer(0.2, nu, 1.15, learn_beta=True, num_classes=classes)
    got, want = loss(one, label, triplets=triplets), peer(two, label, triplets)
    got.backward()
    want.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.beta.grad, peer.beta.grad)


def test_without_triplets_it_mines_with_one_number_of_the_global_generator():
    z, label = batch()
    z.requires_grad_()
    loss = MarginLoss(num_classes=4, cutoff=0.3, nonzero_loss_cutoff=1.6)
    torch.manual_seed(11)
    got = loss(z, label)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    generator = seeded(int(torch.randint(2**31, (1,))))
    assert torch.equal(state, torch.get_rng_state())
    triplets = DistanceWeightedMiner(0.3, 1.6)(z, label, None, generator)
    want = loss(z, label, triplets=triplets)
    assert torch.equal(got, want)
    gradients = [torch.autograd.grad(x, [z, loss.beta]) for x in (got, want)]
    torch.testing.assert_close(*gradients)  # rows that serve as positives and negatives learn, too
    assert not torch.equal(got, loss(z, label))  # another number, other negatives


def test_scaling_weights_or_embedding_changes_nothing():
    z, label = batch()
    values = []
    for rows, w in ((z, None), (z, torch.full((20,), 0.3)), (7 * z, None)):
        torch.manual_seed(0)
        values.append(MarginLoss(nu=0.1)(rows, label, w))
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(values[2], values[0])


def test_the_boundary_learns_from_its_own_class():
    z, label = batch()
    loss = MarginLoss(num_classes=6)
    loss(z, label).backward()
    assert (loss.beta.grad[4:] == 0).all()
    z, label, triplets = triangle(1.3, 1.5)
    loss = MarginLoss(num_classes=2)
    loss(z, label, triplets=triplets).backward()
    assert loss.beta.grad.tolist() == [-1.0, 0.0]  # a positive outside: the boundary moves out
    loss.beta.grad = None
    loss(z, torch.tensor([1, 0, 0]), triplets=triplets).backward()  # triplets as given: the anchor's boundary
    assert loss.beta.grad.tolist() == [0.0, -1.0]


def test_arguments_rebuild_it():
    given = {
        "margin": 0.1,
        "beta": 1.0,
        "nu": 0.3,
        "num_classes": 5,
        "cutoff": 0.4,
        "nonzero_loss_cutoff": 1.1,
    }
    loss = MarginLoss(**given)
    with torch.no_grad():
        loss.beta.add_(0.5)
    assert loss.arguments() == MarginLoss(**loss.arguments()).arguments() == given
    assert loss.beta.tolist() == pytest.approx([1.5] * 5)


def test_senseless_arguments_are_refused():
    for name, value in (("margin", -0.1), ("nu", -1.0), ("beta", 0.0), ("beta", 2.0), ("num_classes", 0)):
        with pytest.raises(ValueError, match=rf"'{name}'.*got {value}"):
            MarginLoss(**{name: value})
    with pytest.raises(ValueError, match=r"'cutoff'.*\(0, 2\), got 0"):
        DistanceWeightedMiner(0)
    with pytest.raises(ValueError, match=r"'nonzero_loss_cutoff' must be above 'cutoff' = 0\.5, got 0\.5"):
        MarginLoss(nonzero_loss_cutoff=0.5)


def test_unfit_labels_and_triplets_are_named():
    z, label = batch()
    with pytest.raises(ValueError, match=r"Label 3 has no boundary: MarginLoss has num_classes = 3.*0 to 2"):
        MarginLoss(num_classes=3)(z, label)
    with pytest.raises(ValueError, match="Label -1"):
        MarginLoss(num_classes=9)(z, label - 1)
    row = torch.arange(3)
    for wrong in ((row, row), (row, row, row[:2]), (row, row, row.float())):
        with pytest.raises(
            ValueError, match=r"'triplets' must be \(anchor, positive, negative\), three int64"
        ):
            MarginLoss()(z, label, triplets=wrong)
    with pytest.raises(ValueError, match="0 to 19, got 0 to 20"):
        MarginLoss()(z, label, triplets=(row, row, row + 18))
