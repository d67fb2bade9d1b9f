"""CombinedLoss: the sum of its parts, in value and gradient, and what filters ask of it."""

from __future__ import annotations

import pytest
import torch

from lightning_nrml.losses import CombinedLoss, ContrastiveLoss, CosineSoftmaxLoss, SupConLoss
from lightning_nrml.modules.arguments import _plain, as_loss


def batch(n=12, d=8, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, requires_grad=True), torch.arange(n) % classes


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 0.5] * 4)])
def test_value_and_gradient_are_the_weighted_sum(weight):
    z, y = batch()
    softmax = CosineSoftmaxLoss(3, 8)
    loss = CombinedLoss([ContrastiveLoss(), softmax], [1.0, 0.3])
    total = loss(z, y, weight)
    expected = ContrastiveLoss()(z, y, weight) + 0.3 * softmax(z, y, weight)
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(
        torch.autograd.grad(total, [z, softmax.class_weight], retain_graph=True),
        torch.autograd.grad(expected, [z, softmax.class_weight]),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_a_weight_of_zero_switches_a_part_off_and_an_infinite_one_is_refused():
    z, y = batch()
    torch.testing.assert_close(
        CombinedLoss([ContrastiveLoss(), SupConLoss()], [0, 2])(z, y), 2 * SupConLoss()(z, y)
    )
    for bad in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match="numbers of 0 or more"):
            CombinedLoss([SupConLoss()], [bad])


def test_filters_get_what_a_part_has():
    z, y = batch()
    softmax = CosineSoftmaxLoss(3, 8)
    loss = CombinedLoss([ContrastiveLoss(), softmax], [1.0, 0.5])
    torch.testing.assert_close(loss.logits(z), softmax.logits(z))
    assert loss.proxies() is softmax.class_weight
    expected = ContrastiveLoss().per_sample(z, y) + 0.5 * softmax.per_sample(z, y)
    torch.testing.assert_close(loss.per_sample(z, y), expected)
    assert CombinedLoss([SupConLoss()]).logits(z) is None
    assert CombinedLoss([SupConLoss()]).proxies() is None


def test_pair_weights_reach_the_parts_that_take_them():
    z, y = batch()
    pairs = torch.rand(12, 12)
    softmax = CosineSoftmaxLoss(3, 8)
    loss = CombinedLoss([ContrastiveLoss(), softmax])
    assert loss.takes_pairs
    assert not CombinedLoss([softmax]).takes_pairs
    torch.testing.assert_close(loss(z, y, None, pairs), ContrastiveLoss()(z, y, None, pairs) + softmax(z, y))


def test_nothing_kept_gives_zero_on_the_graph():
    z, y = batch()
    total = CombinedLoss([ContrastiveLoss(), CosineSoftmaxLoss(3, 8)])(z, y, torch.zeros(12))
    assert float(total) == 0
    (grad,) = torch.autograd.grad(total, z)
    assert not grad.any()


def test_a_checkpoint_rebuilds_it():
    loss = CombinedLoss([ContrastiveLoss(0.3), CosineSoftmaxLoss(3, 8, 4.0)], [1.0, 0.3])
    again = as_loss(_plain(loss))
    assert isinstance(again, CombinedLoss)
    assert again.weights == [1.0, 0.3]
    assert again.losses[0].neg_margin == 0.3
    assert again.losses[1].scale == 4.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([],), "at least one loss"),
        (([ContrastiveLoss()], [1.0, 2.0]), "must hold 1 numbers"),
        (([ContrastiveLoss()], [-1.0]), "0 or more"),
        (([ContrastiveLoss()], [float("nan")]), "0 or more"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        CombinedLoss(*args)


def test_a_foreign_loss_is_refused():
    with pytest.raises(TypeError, match="takes losses of lightning_nrml, got CrossEntropyLoss; PMLLoss"):
        CombinedLoss([torch.nn.CrossEntropyLoss()])
