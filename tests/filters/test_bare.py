"""BARE against the card's numbers, a slow loop, and its known traps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_nrml.filters import BARE
from lightning_nrml.modules.base import _loss
from lightning_nrml.types import FilterContext, Selection, StepOutput


def context(logits, label, embedding=None):
    label = torch.as_tensor(label)
    z = torch.ones(len(label), 2) if embedding is None else embedding
    return FilterContext(z, label, torch.arange(len(label)), logits=logits)


def noisy(n=64, classes=10, rate=0.4, seed=0, sharp=4.0):
    """Separable logits; a share of the given labels is wrong."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (n,), generator=g)
    logits = sharp * F.one_hot(truth, classes) + torch.randn(n, classes, generator=g)
    other = (truth + torch.randint(1, classes, (n,), generator=g)) % classes
    return logits, torch.where(torch.rand(n, generator=g) < rate, other, truth), truth


def test_the_worked_example() -> None:
    p = torch.tensor([0.9, 0.6, 0.3, 0.2])
    logits = torch.stack([p, 1 - p], 1).log()
    selection = BARE().select(context(logits, [0, 0, 1, 1]))
    assert selection.stats["mean"].tolist() == pytest.approx([0.5, 0.5])
    assert selection.stats["std"].tolist() == pytest.approx([0.316228, 0.316228], abs=1e-6)
    assert selection.stats["threshold"].tolist() == pytest.approx([0.816228, 0.816228], abs=1e-6)
    assert selection.weight.tolist() == [1, 0, 0, 0]
    assert float(selection.threshold.exp()) == pytest.approx(0.816228, abs=1e-6)
    loss = F.cross_entropy(logits, torch.tensor([0, 0, 1, 1]), reduction="none")
    assert float(loss[selection.keep].mean()) == pytest.approx(0.10536, abs=1e-5)


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_slow_loop(k, dtype) -> None:
    logits, label, _ = noisy(seed=1)
    logits = logits.to(dtype)
    selection = BARE(k).select(context(logits, label))
    p = logits.double().softmax(1)
    want = []
    for i, y in enumerate(label.tolist()):
        column = [float(v) for v in p[:, y]]
        mean = sum(column) / len(column)
        std = math.sqrt(sum((v - mean) ** 2 for v in column) / (len(column) - 1))
        want.append(float(column[i] - mean >= k * std))
    assert selection.weight.tolist() == want
    assert 0 < sum(want) < len(want)
    assert selection.score.dtype is torch.float32
    torch.testing.assert_close(selection.score, p.log().gather(1, label[:, None])[:, 0].float())


def test_a_larger_k_keeps_a_subset() -> None:
    logits, label, _ = noisy(seed=2)
    kept = [BARE(k).select(context(logits, label)).keep for k in (2.0, 1.0, 0.0)]
    assert [int(k.sum()) for k in kept] == sorted(int(k.sum()) for k in kept)
    assert int(kept[0].sum()) < int(kept[2].sum())
    assert not (kept[0] & ~kept[1]).any()
    assert not (kept[1] & ~kept[2]).any()


def test_shifts_order_and_copies_do_not_matter() -> None:
    logits, label, _ = noisy(seed=3)
    keep = BARE().select(context(logits, label)).keep
    shifted = logits + torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.equal(BARE().select(context(shifted, label)).keep, keep)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(BARE().select(context(logits[order], label[order])).keep, keep[order])
    twice = BARE().select(context(logits.repeat(2, 1), label.repeat(2)))
    # sd shrinks by the factor sqrt((n - 1) / (n - 1/2)): only a row within it may change, here none
    assert torch.equal(twice.keep, keep.repeat(2))
    ratio = twice.stats["std"] / BARE().select(context(logits, label)).stats["std"]
    torch.testing.assert_close(ratio, torch.full((10,), math.sqrt(63 / 63.5)), rtol=1e-5, atol=0)


def test_dropped_rows_get_no_gradient_and_kept_ones_that_of_the_mean() -> None:
    logits, label, _ = noisy(seed=4)
    logits.requires_grad_()
    selection = BARE().select(context(logits.detach(), label))
    per_sample = F.cross_entropy(logits, label, reduction="none")
    out = StepOutput(torch.ones(64, 2), label, torch.arange(64), per_sample_loss=per_sample)
    _loss(out, selection)[0].backward()
    keep = selection.keep
    assert not logits.grad[~keep].any()
    want = (logits.detach().softmax(1) - F.one_hot(label, 10)) / keep.sum()
    torch.testing.assert_close(logits.grad[keep], want[keep])


def test_nothing_kept_falls_back_to_the_whole_batch() -> None:
    logits, _, _ = noisy(seed=5)
    least = logits.argmin(dim=1)
    selection = BARE().select(context(logits, least))
    assert bool(selection.stats["fallback"])
    assert selection.weight.tolist() == [1.0] * 64
    loss = F.cross_entropy(logits, least, reduction="none")
    out = StepOutput(torch.ones(64, 2), least, torch.arange(64), per_sample_loss=loss)
    assert float(_loss(out, selection)[0]) == pytest.approx(float(loss.mean()), rel=1e-6)


def test_kept_rows_are_cleaner_than_the_batch() -> None:
    logits, label, truth = noisy(256, seed=6)
    keep = BARE().select(context(logits, label)).keep
    clean = label == truth
    assert float(clean.float().mean()) < 0.65
    assert float(clean[keep].float().mean()) > 0.9


def test_one_row_and_equal_logits_keep_everything() -> None:
    one = BARE().select(context(torch.tensor([[3.0, 0.0]]), [1]))
    assert one.weight.tolist() == [1.0]
    assert bool(one.stats["fallback"])
    for value in (0.0, 0.1):  # 0.1 is no binary number: rounding must not decide
        equal = BARE().select(context(torch.full((37, 7), value), torch.arange(37) % 7))
        assert equal.weight.tolist() == [1.0] * 37
        assert not bool(equal.stats["fallback"])


def test_broken_rows_are_dropped_and_count_nowhere() -> None:
    logits, label, _ = noisy(seed=7)
    want = BARE().select(context(logits, label))
    broken = torch.cat([logits, torch.full((3, 10), torch.nan), torch.full((1, 10), torch.inf)])
    got = BARE().select(context(broken, torch.cat([label, torch.zeros(4, dtype=torch.int64)])))
    assert torch.equal(got.keep[:64], want.keep)
    assert not got.keep[64:].any()
    assert got.score[64:].isnan().all()
    assert got.stats["nonfinite"].tolist() == [False] * 64 + [True] * 4
    torch.testing.assert_close(got.stats["threshold"], want.stats["threshold"])


def test_posterior_of_centres() -> None:
    centers = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rows = F.normalize(torch.tensor([[1.0, 0.1], [0.2, 1.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    label = torch.tensor([0, 1, 1, 2])
    part = BARE(0.0, "centers", num_classes=3, embedding_dim=2, memory_size=8, scale=4.0)
    assert part.select(context(None, label, rows)).weight.tolist() == [1.0] * 4  # nothing known yet
    start = context(None, [0, 1], centers)
    part.update(start, Selection.keep_all(start.label))
    selection = part.select(context(None, label, rows))
    p = (4 * rows @ centers.T).softmax(1)
    want = p.gather(1, label.clamp(max=1)[:, None])[:, 0].log()
    torch.testing.assert_close(selection.score[:3], want[:3], rtol=1e-5, atol=1e-6)
    assert selection.score[3].isnan()  # class 2 has no centre: kept, unknown
    assert selection.weight.tolist() == [1, 1, 0, 1]
    assert selection.stats["unknown"].tolist() == [False, False, False, True]
    assert selection.stats["suggested"].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(selection.stats["mean"][:2], p.mean(0))
    part.update(context(None, label, rows), selection)
    assert int(part.bank.count) == 5  # the dropped row was not remembered


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="posterior must be 'logits' or 'centers', got 'proxies'"):
        BARE(posterior="proxies")
    with pytest.raises(ValueError, match="needs num_classes and embedding_dim"):
        BARE(posterior="centers")
    with pytest.raises(ValueError, match="scale must be positive"):
        BARE(scale=0)
    with pytest.raises(ValueError, match=r"needs logits \(B, C\)"):
        BARE().select(context(None, [0, 1]))
    with pytest.raises(ValueError, match=r"label 7 is outside 0\.\.2"):
        BARE().select(context(torch.zeros(2, 3), [0, 7]))
