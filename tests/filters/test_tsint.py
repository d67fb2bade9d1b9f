"""T-SINT: the noise arithmetic, the toy of the card, the running cuts, and what the mask depends on."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from lightning_nrml.filters import TSINT
from lightning_nrml.filters.tsint import quantile, right_positives, wrong_negatives
from lightning_nrml.losses import ContrastiveLoss
from lightning_nrml.types import FilterContext


def context(teacher, label, embedding=None):
    label = torch.as_tensor(label)
    z = torch.ones(len(label), 2) if embedding is None else embedding
    return FilterContext(z, label, torch.arange(len(label)), teacher=teacher)


def batch(n=32, classes=4, seed=0, dim=8):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, dim, generator=g), dim=1), torch.arange(n) % classes


@pytest.mark.parametrize(
    ("rate", "right", "wrong"),
    [(0.1, 0.8101, 0.00192), (0.2, 0.6404, 0.00363), (0.5, 0.2525, 0.00755), (0.7, 0.0949, 0.00914)],
)
def test_noise_arithmetic(rate, right, wrong) -> None:
    assert right_positives(rate, 100) == pytest.approx(right, abs=5e-5)
    assert wrong_negatives(rate, 100) == pytest.approx(wrong, abs=5e-6)
    assert TSINT(100, rate).shares == (right_positives(rate, 100), wrong_negatives(rate, 100))
    assert TSINT(100, rate, keep_positive=0.5, drop_negative=0.1).shares == (0.5, 0.1)


def test_noise_arithmetic_is_that_of_drawn_labels() -> None:
    g = torch.Generator().manual_seed(0)
    classes, n, rate = 5, 4000, 0.4
    truth = torch.arange(n) % classes
    other = (truth + torch.randint(1, classes, (n,), generator=g)) % classes
    given = torch.where(torch.rand(n, generator=g) < rate, other, truth)
    same, right = given[:, None] == given, truth[:, None] == truth
    off = ~torch.eye(n, dtype=torch.bool)
    assert float(right[same & off].float().mean()) == pytest.approx(right_positives(rate, classes), abs=0.01)
    assert float(right[~same].float().mean()) == pytest.approx(wrong_negatives(rate, classes), abs=0.01)
    assert right_positives(0.3, 1) == 1
    assert wrong_negatives(0.3, 1) == 0


def test_everything_kept_is_the_plain_contrastive_loss_bit_for_bit() -> None:
    teacher, label = batch()
    part = TSINT(4, keep_positive=1.0, drop_negative=0.0, momentum=0.0)
    z = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for _ in range(3):
        selection = part.select(context(teacher, label))
        assert (selection.pair_weight == 1).all()
    with_pairs = ContrastiveLoss()(z, label, selection.weight, selection.pair_weight)
    plain = ContrastiveLoss()(z, label, None)
    assert torch.equal(with_pairs, plain)
    assert float(plain.detach()) > 0


def test_toy_of_two_classes_with_one_wrong_label() -> None:
    # six points of class A and B around two axes; the last of A's four is an image of B
    angle = torch.tensor([0.00, 0.02, 0.05, 1.50, 1.57, 1.53, 1.51, 1.585])
    teacher = torch.stack([angle.cos(), angle.sin()], 1)
    label = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    selection = TSINT(2, keep_positive=0.75, drop_negative=0.25).select(context(teacher, label))
    gone = (selection.pair_weight == 0).nonzero().tolist()
    want = (
        [[i, 3] for i in range(3)] + [[3, j] for j in (0, 1, 2, 4, 5, 6, 7)] + [[i, 3] for i in range(4, 8)]
    )
    assert sorted(gone) == sorted(want)
    assert torch.equal(selection.pair_weight, selection.pair_weight.T)
    assert float(selection.stats["keep_positive"]) == pytest.approx(0.75)
    assert float(selection.stats["keep_negative"]) == pytest.approx(0.75)
    # sample 3 keeps none of its 3 positive pairs, the others of A two of three, those of B all
    want_score = [math.log(2.5 / 4)] * 3 + [math.log(0.5 / 4)] + [math.log(3.5 / 4)] * 4
    assert selection.score.tolist() == pytest.approx(want_score)
    assert selection.weight.tolist() == [1.0] * 8


def test_running_cuts() -> None:
    teacher, label = batch()
    part = TSINT(4, keep_positive=0.5, drop_negative=0.2, momentum=0.9)
    part.select(context(teacher, label))
    first = part.cuts.clone()
    upper = torch.ones(32, 32).triu(1).bool()
    distance = torch.cdist(teacher, teacher)
    same = label[:, None] == label
    for place, (mask, q) in enumerate(((same, 0.5), (~same, 0.2))):
        want = distance[mask & upper].quantile(q)
        torch.testing.assert_close(first[place], want, rtol=1e-5, atol=1e-6)
    for _ in range(5):
        part.select(context(teacher, label))
    assert torch.equal(part.cuts, first)  # equal batches leave them where they are, bit for bit
    other, _ = batch(seed=5)
    own = TSINT(4, keep_positive=0.5, drop_negative=0.2)
    own.select(context(other, label))
    part.select(context(other, label))
    torch.testing.assert_close(part.cuts, 0.9 * first + 0.1 * own.cuts)
    before = part.cuts.clone()
    alone = part.select(context(teacher[:4], torch.arange(4)))  # no positive pair: that cut stays
    assert part.cuts[0] == before[0]
    assert part.cuts[1] != before[1]
    assert alone.score.isnan().all()


def test_mask_depends_on_teacher_and_labels_only_and_not_on_order() -> None:
    teacher, label = batch(seed=2)
    student = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    want = TSINT(4).select(context(teacher, label, student)).pair_weight
    assert 0 < float((want == 0).float().mean()) < 1
    assert torch.equal(TSINT(4).select(context(teacher, label, student * 2 + 1)).pair_weight, want)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    got = TSINT(4).select(context(teacher[order], label[order])).pair_weight
    assert torch.equal(got, want[order][:, order])
    changed = teacher.clone()
    changed[0] = -changed[0]
    assert not torch.equal(TSINT(4).select(context(changed, label)).pair_weight, want)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.7])
def test_kept_positives_are_better_than_the_arithmetic_says_of_all(rate) -> None:
    g = torch.Generator().manual_seed(9)
    classes, n = 8, 256
    center = 3 * torch.randn(classes, 16, generator=g)
    truth = torch.randint(classes, (n,), generator=g)
    teacher = normalize(center[truth] + torch.randn(n, 16, generator=g), dim=1)
    other = (truth + torch.randint(1, classes, (n,), generator=g)) % classes
    given = torch.where(torch.rand(n, generator=g) < rate, other, truth)
    selection = TSINT(classes, rate).select(context(teacher, given))
    off = ~torch.eye(n, dtype=torch.bool)
    kept = (given[:, None] == given) & (selection.pair_weight > 0) & off
    share = float((truth[:, None] == truth)[kept].float().mean())
    assert share > right_positives(rate, classes) + 0.2


def test_broken_rows_have_no_pairs_and_poison_nothing() -> None:
    teacher, label = batch(seed=4)
    want = TSINT(4).select(context(teacher, label))
    wide = torch.cat([teacher, torch.full((2, 8), torch.nan)])
    z = torch.ones(34, 2)
    z[33] = torch.inf
    part = TSINT(4)
    got = part.select(context(wide, torch.cat([label, torch.tensor([0, 1])]), z))
    assert torch.equal(got.pair_weight[:32, :32], want.pair_weight)
    assert got.weight.tolist() == [1.0] * 33 + [0.0]
    assert part.cuts.isfinite().all()
    assert got.score[32:].isnan().all()


def test_masked_quantile_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    value, mask = torch.randn(13, 11, generator=g), torch.rand(13, 11, generator=g) < 0.4
    for q in (0.0, 0.25, 0.5, 0.913, 1.0):
        torch.testing.assert_close(quantile(value, mask, q), value[mask].quantile(q))
    assert quantile(value, mask & False, 0.5).isnan()
    assert quantile(value[:0], mask[:0], 0.5).isnan()


def test_errors_name_what_is_wrong() -> None:
    for kwargs, message in (
        ({"noise_rate": 1.0}, "noise_rate must lie in"),
        ({"keep_positive": 1.5}, "keep_positive is a share"),
        ({"drop_negative": -0.5}, "drop_negative is a share"),
        ({"momentum": 1.0}, "momentum must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            TSINT(4, **kwargs)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        TSINT(0)
    with pytest.raises(ValueError, match="TSINT needs teacher embeddings"):
        TSINT(4).select(context(None, [0, 1]))
