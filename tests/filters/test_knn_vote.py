"""The kNN vote against a slow loop, its own rows, and its thresholds."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from lightning_nrml.filters import KNNVote
from lightning_nrml.types import FilterContext, Selection


def context(z, label, index=None):
    label = torch.as_tensor(label)
    index = torch.arange(len(label)) if index is None else torch.as_tensor(index)
    return FilterContext(z, label, index)


def remember(part, ctx):
    part.update(ctx, Selection.keep_all(ctx.label))


def clusters(classes=4, n=160, dim=8, rate=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    center = 2 * torch.randn(classes, dim, generator=g)
    truth = torch.arange(n) % classes
    z = normalize(center[truth] + torch.randn(n, dim, generator=g), dim=1)
    wrong = torch.rand(n, generator=g) < rate
    return z, torch.where(wrong, (truth + 1) % classes, truth), truth


@pytest.mark.parametrize("block", [1, 2**24])
def test_equals_the_slow_loop(block, monkeypatch) -> None:
    monkeypatch.setattr("lightning_nrml.filters.knn_vote._BLOCK", block)
    z, label, _ = clusters(rate=0.3, seed=1)
    part = KNNVote(4, 8, k=5, memory_size=100, smoothing=0.5)
    remember(part, context(z[:120], label[:120]))  # the ring keeps rows 20 to 119
    ctx = context(z[100:140], label[100:140], range(100, 140))
    score, suggested = part.score(ctx), part.suggest(ctx)
    for i in range(40):
        near = sorted((j for j in range(20, 120) if j != 100 + i), key=lambda j: -float(z[100 + i] @ z[j]))[
            :5
        ]
        votes = [int(label[j]) for j in near]
        want = math.log((votes.count(int(label[100 + i])) + 0.5 / 4) / 5.5)
        assert float(score[i]) == pytest.approx(want, abs=1e-6)
        top = max(votes.count(v) for v in votes)
        assert int(suggested[i]) == next(v for v in votes if votes.count(v) == top)


def test_a_sample_does_not_vote_for_itself() -> None:
    z, _, _ = clusters(2, 12, seed=2)
    z[6:] = z[:6]
    part = KNNVote(2, 8, k=1, memory_size=20)
    remember(part, context(z[:6], [0, 0, 0, 1, 1, 1], range(6)))
    same = part.score(context(z[:1], [0], [0]))
    other = part.score(context(z[:1], [0], [99]))
    nearest = int((z[1:6] @ z[0]).argmax()) + 1
    assert float(other) == pytest.approx(math.log(1.5 / 2), abs=1e-6)
    assert float(same) == pytest.approx(math.log((1.5 if nearest < 3 else 0.5) / 2), abs=1e-6)
    # all its earlier rows are left out, not only the newest
    remember(part, context(z[:1], [0], [0]))
    assert torch.equal(part.score(context(z[:1], [0], [0])), same)


def test_too_few_voters_give_no_opinion() -> None:
    z, label, _ = clusters(seed=3)
    part = KNNVote(4, 8, k=5)
    remember(part, context(z[:5], label[:5]))
    selection = part.select(context(z[:8], label[:8]))
    assert selection.score.isnan().tolist() == [True] * 5 + [False] * 3
    assert selection.keep.all() or int((~selection.keep[5:]).sum()) == int((~selection.keep).sum())
    assert selection.stats["unknown"].tolist() == [True] * 5 + [False] * 3
    assert selection.stats["suggested"][:5].tolist() == [-1] * 5


def test_quantile_finds_the_wrong_labels() -> None:
    z, label, truth = clusters(n=1200, rate=0.4, seed=4)
    part = KNNVote(4, 8, k=10, noise_rate=0.4, memory_size=600, window=4, warmup_steps=4)
    right = kept = wrong_dropped = 0
    for step, rows in enumerate(torch.arange(1200).split(40)):
        ctx = context(z[rows], label[rows], rows)
        selection = part.select(ctx)
        part.update(ctx, selection)
        if step < 4:
            assert selection.keep.all()
        elif step > 10:
            clean = label[rows] == truth[rows]
            right += int((clean & selection.keep).sum())
            kept += int(selection.keep.sum())
            wrong_dropped += int((~clean & ~selection.keep).sum())
    assert right / kept > 0.8  # .6 without a filter
    assert wrong_dropped > 200
    assert int(part.queue.count) < 1200 * 0.75


def test_fixed_threshold_and_whole_set_rule() -> None:
    z, label, truth = clusters(n=400, rate=0.3, seed=5)
    part = KNNVote(4, 8, k=10, threshold=0.5, memory_size=400)
    ctx = context(z, label)
    remember(part, ctx)
    score = part.score(ctx)
    by_batch, by_set = part.select(ctx), part.select_scores(score)
    assert float(by_set.threshold) == pytest.approx(math.log(0.5))
    assert torch.equal(by_batch.keep, score > math.log(0.5))
    assert torch.equal(by_set.keep, by_batch.keep)
    assert float((label == truth)[by_set.keep].float().mean()) > 0.9
    score[:7] = torch.nan
    assert part.select_scores(score).keep[:7].all()
    by_rate = KNNVote(4, 8, k=10, noise_rate=0.25).select_scores(torch.arange(100.0))
    assert int((~by_rate.keep).sum()) == 25


def test_errors_name_what_is_wrong() -> None:
    for kwargs, message in (
        ({"k": 0}, "k must be at least 1"),
        ({"k": 9, "memory_size": 8}, "memory_size must be at least k = 9"),
        ({"threshold": 1.0}, "threshold is a probability"),
        ({"smoothing": 0.0}, "smoothing must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"noise_rate": -0.1}, "noise_rate must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            KNNVote(4, 8, **kwargs)
    with pytest.raises(ValueError, match=r"label 5 is outside 0\.\.3"):
        KNNVote(4, 8).select(context(torch.ones(1, 8), [5]))
