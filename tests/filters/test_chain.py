"""The chain gathers, asks, multiplies and commits; decisions of two processes equal those of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nrml.filters import FixedFilter, NoiseFilter
from lightning_nrml.filters.chain import FilterChain, gathered_context, select, tolerate_absent_filters
from lightning_nrml.types import FilterContext, Selection


class MedianFilter(NoiseFilter):
    """Keeps rows whose first coordinate is above the batch median: depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def score(self, ctx: FilterContext) -> torch.Tensor:
        return ctx.embedding[:, 0]

    def select(self, ctx: FilterContext) -> Selection:
        score = self.score(ctx)
        threshold = score.median()
        return Selection((score > threshold).float(), score, threshold)

    def update(self, ctx: FilterContext, selection: Selection) -> None:
        self.seen += int(selection.keep.sum())


class LogitFilter(MedianFilter):
    requires = ("logits",)


def _chain(**filters: NoiseFilter) -> FilterChain:
    chain = FilterChain()
    for name, part in filters.items():
        chain[name] = part
        chain.mode[name] = "batch"
    return chain


def _context(n: int = 8) -> FilterContext:
    z = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    ctx, _ = gathered_context(embedding=z, label=torch.zeros(n, dtype=torch.int64), index=torch.arange(n))
    return ctx


def test_no_active_filter_keeps_everything() -> None:
    chain = _chain(median=MedianFilter())
    chain.mode["median"] = "off"
    assert chain.select(_context()).weight.tolist() == [1.0] * 8


def test_weights_of_two_filters_multiply() -> None:
    mask = torch.tensor([True, False] * 4)
    half, fixed = MedianFilter(), FixedFilter(mask)
    ctx = _context()
    both = _chain(median=half, fixed=fixed).select(ctx)
    expected = half.select(ctx).weight * fixed.select(ctx).weight
    assert torch.equal(both.weight, expected)
    assert 0 < both.weight.sum() < 4


def test_observing_filter_learns_but_does_not_decide() -> None:
    half = MedianFilter()
    chain = _chain(median=half)
    chain.mode["median"] = "observe"
    assert chain.select(_context()).weight.min() == 1
    chain.commit()
    assert int(half.seen) == 8


def test_commit_happens_once() -> None:
    half = MedianFilter()
    chain = _chain(median=half)
    chain.select(_context())
    assert chain.commit() is not None
    assert chain.commit() is None
    assert int(half.seen) == 4


def test_epoch_mode_reads_the_whole_set_decision() -> None:
    chain = _chain(median=MedianFilter())
    chain.mode["median"] = "epoch"
    keep = torch.arange(8) % 3 == 0
    chain.epoch_keep["median"] = lambda: keep
    assert torch.equal(chain.select(_context()).keep, keep)


def test_missing_logits_are_named() -> None:
    with pytest.raises(ValueError, match=r"'logit'.*needs `logits`"):
        _chain(logit=LogitFilter()).select(_context())


def test_context_rows_are_unit_float32_without_gradient() -> None:
    z = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)
    ctx, rows = gathered_context(embedding=z * 7, label=torch.zeros(5).long(), index=torch.arange(5))
    assert ctx.embedding.dtype is torch.float32
    assert not ctx.embedding.requires_grad
    torch.testing.assert_close(ctx.embedding.norm(dim=1), torch.ones(5))
    assert rows == slice(0, 5)


def test_select_is_neutral_without_filters_and_in_evaluation() -> None:
    module = nn.Linear(4, 4)
    arguments = {"embedding": torch.randn(6, 4), "label": torch.zeros(6).long(), "index": torch.arange(6)}
    assert select(module, **arguments).weight.sum() == 6
    module.filters = _chain(median=MedianFilter())
    assert select(module, **arguments, epoch=0, step=0).weight.sum() == 3
    module.eval()
    assert select(module, **arguments).weight.sum() == 6


def test_left_over_filter_state_is_dropped_and_nothing_else() -> None:
    saved = nn.Linear(2, 2)
    saved.filters = _chain(median=MedianFilter())
    fresh = nn.Linear(2, 2)
    tolerate_absent_filters(fresh)
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh.weight, saved.weight)
    with pytest.raises(RuntimeError, match=r"other\.weight"):
        fresh.load_state_dict({**saved.state_dict(), "other.weight": torch.zeros(1)})


def test_owned_filter_state_is_restored() -> None:
    saved, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    for module in (saved, fresh):
        module.filters = _chain(median=MedianFilter())
        tolerate_absent_filters(module)
    saved.filters["median"].seen += 5
    fresh.load_state_dict(saved.state_dict())
    assert int(fresh.filters["median"].seen) == 5
