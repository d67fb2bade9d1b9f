"""CosineSoftmaxLoss: closed form and loop."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nrml.losses import CombinedLoss, ContrastiveLoss, CosineSoftmaxLoss


def test_closed_form():
    loss = CosineSoftmaxLoss(2, 2, scale=3.0)
    with torch.no_grad():
        loss.class_weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
    z = torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    torch.testing.assert_close(loss.logits(z), torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
    right, wrong = math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))
    assert loss(z, torch.tensor([0, 0])).item() == pytest.approx((right + wrong) / 2)
    assert loss(z, torch.tensor([0, 0]), torch.tensor([0.5, 0.25])).item() == pytest.approx(
        (0.5 * right + 0.25 * wrong) / 0.75
    )


def test_only_the_direction_of_the_classes_counts():
    torch.manual_seed(0)
    loss = CosineSoftmaxLoss(5, 4)
    z, label = torch.randn(6, 4), torch.arange(6) % 5
    before = loss(z, label)
    with torch.no_grad():
        loss.class_weight.mul_(torch.rand(5, 1) + 0.1)
    torch.testing.assert_close(loss(3 * z, label), before)


def test_class_rows_start_near_unit_length():
    torch.manual_seed(0)
    length = CosineSoftmaxLoss(200, 128).class_weight.norm(dim=1)
    assert (length - 1).abs().max() < 0.3


def test_logits_are_fp32_under_autocast():
    loss = CosineSoftmaxLoss(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss.logits(torch.randn(3, 4).bfloat16()).dtype is torch.float32


def test_senseless_arguments_are_refused():
    with pytest.raises(ValueError, match="'num_classes' must be at least 1, got 0"):
        CosineSoftmaxLoss(0, 4)
    with pytest.raises(ValueError, match="'embedding_dim' must be at least 1, got -1"):
        CosineSoftmaxLoss(embedding_dim=-1)
    with pytest.raises(ValueError, match=r"'scale' must be positive, got -1\.0"):
        CosineSoftmaxLoss(3, 4, scale=-1.0)


def test_sizes_come_from_the_module_that_takes_the_loss():
    torch.manual_seed(0)
    given = CosineSoftmaxLoss(5, 4)
    torch.manual_seed(0)
    told = CombinedLoss([ContrastiveLoss(), CosineSoftmaxLoss()])
    told.set_sizes(5, 4)
    inner = told.losses[1]
    assert torch.equal(inner.class_weight, given.class_weight)
    assert inner.arguments() == given.arguments()
    before = inner.class_weight
    told.set_sizes(5, 4)
    assert inner.class_weight is before
    CosineSoftmaxLoss(7, 4).set_sizes(5, 4)  # classes to spare are the user's affair
    for loss, sizes, message in (
        (CosineSoftmaxLoss(), (None, 4), "needs 'num_classes': give it to the loss, or to the module"),
        (CosineSoftmaxLoss(4, 4), (5, 4), "has num_classes 4, but the module that takes it 5: leave it out"),
        (CosineSoftmaxLoss(5, 8), (5, 4), "has embedding_dim 8, but the module that takes it 4"),
    ):
        with pytest.raises(ValueError, match=message):
            loss.set_sizes(*sizes)
    with pytest.raises(ValueError, match="was given no sizes"):
        CosineSoftmaxLoss()(torch.randn(2, 4), torch.tensor([0, 1]))


def test_loss_of_each_sample_is_its_cross_entropy():
    torch.manual_seed(0)
    loss = CosineSoftmaxLoss(5, 4)
    z, label = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    each = loss.per_sample(z, label)
    assert not each.requires_grad
    torch.testing.assert_close(each.mean(), loss(z, label).detach())
    torch.testing.assert_close(each, -loss.logits(z).detach().log_softmax(1)[range(6), label])
    z[2] = torch.nan
    assert loss.per_sample(z, label).isnan().tolist() == [False, False, True, False, False, False]
    assert loss.proxies() is loss.class_weight


@pytest.mark.parametrize("bad", [3, -1, -100])
def test_labels_out_of_range_are_named_unless_their_rows_are_dropped(bad):
    loss, z, label = CosineSoftmaxLoss(3, 4), torch.randn(3, 4), torch.tensor([0, bad, 2])
    for call in (loss, loss.per_sample):
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 2\].*got {bad} in row 1"):
            call(z, label)
    kept = loss(z, label, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(kept, loss(z[[0, 2]], label[[0, 2]]))
