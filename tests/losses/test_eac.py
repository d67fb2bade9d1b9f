"""EACLoss: closed forms, where its gradient goes, sample weights, precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_nrml.losses import EACLoss
from lightning_nrml.losses.eac import attention_maps


def parts(h: int = 7, w: int = 7, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    maps, mirrored = (torch.randn(4, 5, h, w, generator=g, requires_grad=True) for _ in range(2))
    head = torch.nn.Linear(5, 3)
    torch.nn.init.normal_(head.weight, generator=g)
    label = torch.tensor([0, 2, 1, 2])
    return head(maps.mean((2, 3))), label, maps, mirrored, head


def test_maps_of_a_mirror_image_agree_exactly():
    logits, label, maps, _, head = parts()
    total, entropy, attention = EACLoss().terms(logits, label, maps, maps.flip(3), head.weight)
    assert attention == 0
    assert total == entropy
    torch.testing.assert_close(entropy, F.cross_entropy(logits, label))


@pytest.mark.parametrize(("h", "w"), [(7, 7), (6, 8), (8, 4), (1, 1)])
def test_attention_term_is_the_mean_squared_difference(h, w):
    logits, label, maps, mirrored, head = parts(h, w)
    total, entropy, attention = EACLoss(3.0).terms(logits, label, maps, mirrored, head.weight)
    first, second = (
        torch.stack([sum(head.weight[c, d] * x[:, d] for d in range(5)) for c in range(3)], 1)
        for x in (maps, mirrored)
    )
    torch.testing.assert_close(attention, F.mse_loss(first, second.flip(3)))
    torch.testing.assert_close(total, entropy + 3 * attention)


def test_two_places_by_hand():
    one = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    attention = EACLoss().terms(torch.zeros(1, 2), torch.tensor([0]), one, one, torch.ones(2, 1))[2]
    assert attention == 1


def test_mean_of_a_map_and_the_bias_are_the_logit():
    logits, _, maps, _, head = parts()
    torch.testing.assert_close(attention_maps(maps, head.weight).mean((2, 3)) + head.bias, logits)


def test_gradients_reach_both_images_but_not_the_classifier():
    logits, label, maps, mirrored, head = parts()
    attention = EACLoss().terms(logits, label, maps, mirrored, head.weight)[2]
    first, second, own = torch.autograd.grad(
        attention, [maps, mirrored, head.weight], allow_unused=True, retain_graph=True
    )
    assert own is None
    torch.testing.assert_close(first, -second.flip(3))
    assert first.abs().max() > 0
    entropy = EACLoss().terms(logits, label, maps, mirrored, head.weight)[1]
    assert torch.autograd.grad(entropy, mirrored, allow_unused=True)[0] is None


def test_without_weight_it_is_cross_entropy():
    logits, label, maps, mirrored, head = parts()
    value = EACLoss(0.0)(logits, label, maps, mirrored, head.weight)
    # up to rounding: with weights the rows are added up in another order
    torch.testing.assert_close(value, F.cross_entropy(logits, label), rtol=3e-7, atol=0)


def test_dropped_rows_take_no_part_whatever_they_hold():
    logits, label, maps, mirrored, head = parts()
    want = EACLoss()(logits[1:], label[1:], maps[1:], mirrored[1:], head.weight)
    bad = [torch.cat([torch.full_like(x[:1], torch.nan), x[1:]]).detach() for x in (logits, maps, mirrored)]
    for x in bad:
        x.requires_grad_()
    keep = torch.tensor([0.0, 1, 1, 1])
    got = EACLoss()(bad[0], torch.tensor([99, 2, 1, 2]), bad[1], bad[2], head.weight, keep)
    torch.testing.assert_close(got, want)
    got.backward()
    assert all((x.grad[0] == 0).all() for x in bad)
    nothing = EACLoss()(logits, label, maps, mirrored, head.weight, torch.zeros(4))
    assert nothing == 0
    nothing.backward()


def test_half_precision_and_double():
    logits, label, maps, mirrored, head = parts()
    want = EACLoss()(logits, label, maps, mirrored, head.weight)
    half = [x.bfloat16() for x in (logits, maps, mirrored)]
    with torch.autocast("cpu", torch.bfloat16):
        got = EACLoss()(half[0], label, half[1], half[2], head.weight)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    assert (
        EACLoss()(logits.double(), label, maps.double(), mirrored.double(), head.weight).dtype
        is torch.float64
    )
    wide = [x.double() for x in (logits, maps, mirrored)]
    w = torch.full((4,), 1 / 3, dtype=torch.float64)  # rounded to float32 it would not divide out of one row
    w[0] = 1.0
    rows = [
        EACLoss()(*(wide[0][i : i + 1], label[i : i + 1], *(x[i : i + 1] for x in wide[1:])), head.weight)
        for i in range(4)
    ]
    got = EACLoss()(wide[0], label, wide[1], wide[2], head.weight, w)
    torch.testing.assert_close(got, (torch.stack(rows) * w).sum() / w.sum(), rtol=1e-12, atol=0)


def test_errors():
    logits, label, maps, mirrored, head = parts()
    with pytest.raises(
        ValueError, match=r"must both be \(B, 5, h, w\) .* got \(4, 5, 7, 7\) and \(4, 5, 7, 6\)"
    ):
        EACLoss()(logits, label, maps, mirrored[..., :6], head.weight)
    with pytest.raises(ValueError, match="lam is -1"):
        EACLoss(-1)
