"""What every filter must do, whatever its idea."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filter_cases import CLASSES, FILTERS, ROWS, STEPS, rows_of, stream
from helpers import assert_same_state, digits, module, state_of, trainer

from lightning_nrml import callbacks
from lightning_nrml.filters import TSINT, NoiseFilter, SmallLoss
from lightning_nrml.filters.chain import FilterChain, gathered_context
from lightning_nrml.losses import CosineSoftmaxLoss
from lightning_nrml.optim import ScheduleConfig
from lightning_nrml.types import FilterContext, Selection

every_filter = pytest.mark.parametrize("name", list(FILTERS))


def live(part: NoiseFilter, contexts: list[FilterContext]) -> list[Selection]:
    """Select and learn, batch by batch."""
    selections = []
    for ctx in contexts:
        selections.append(part.select(ctx))
        part.update(ctx, selections[-1])
    return selections


def assert_same(one: Selection, two: Selection) -> None:
    """Bit-equal decisions."""
    for name in ("weight", "score", "threshold"):
        assert torch.equal(getattr(one, name).nan_to_num(9e9), getattr(two, name).nan_to_num(9e9)), name
    assert (one.pair_weight is None) == (two.pair_weight is None)
    if one.pair_weight is not None and two.pair_weight is not None:
        assert torch.equal(one.pair_weight, two.pair_weight)


@every_filter
def test_it_filters_and_tells_shapes_and_types(name: str) -> None:
    part, contexts = FILTERS[name](), stream()
    selections = live(part, contexts)
    for ctx, selection in zip(contexts, selections, strict=True):
        assert selection.weight.shape == selection.score.shape == (ROWS,)
        assert selection.weight.dtype is selection.score.dtype is torch.float32
        assert ((selection.weight == 0) | (selection.weight == 1)).all()
        assert selection.threshold.shape == ()
        score = part.score(ctx)
        assert score.shape == (ROWS,)
        assert score.dtype is torch.float32
        assert not (score > 1e-6).any()  # a log-probability
        suggested = part.suggest(ctx)
        if suggested is not None:
            assert suggested.dtype is torch.int64
            assert int(suggested.min()) >= -1
            assert int(suggested.max()) < CLASSES
    pairs = selections[-1].pair_weight
    dropped = (selections[-1].weight == 0).sum() if pairs is None else (pairs == 0).sum()
    assert 0 < int(dropped) < ROWS * (1 if pairs is None else ROWS)


@every_filter
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    contexts = stream()
    orders = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]
    straight = live(FILTERS[name](), contexts)
    mixed = live(FILTERS[name](), [rows_of(c, o) for c, o in zip(contexts, orders, strict=True)])
    for one, two, order in zip(straight, mixed, orders, strict=True):
        assert torch.equal(two.weight, one.weight[order])
        torch.testing.assert_close(two.score, one.score[order], rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(two.threshold, one.threshold, rtol=1e-5, atol=1e-5, equal_nan=True)
        if one.pair_weight is not None:
            assert torch.equal(two.pair_weight, one.pair_weight[order][:, order])


@every_filter
def test_a_restored_filter_goes_on_bit_for_bit(name: str) -> None:
    contexts = stream(1)
    want = live(FILTERS[name](), contexts)
    first, second = FILTERS[name](), FILTERS[name]()
    live(first, contexts[:2])
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for one, two in zip(live(second, contexts[2:]), want[2:], strict=True):
        assert_same(one, two)


@every_filter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(name: str, dtype: torch.dtype) -> None:
    part = FILTERS[name]().to(dtype)
    kept = 0
    for ctx in stream():
        half, _ = gathered_context(
            embedding=ctx.embedding.to(dtype),
            label=ctx.label,
            index=ctx.index,
            logits=ctx.logits.to(dtype),
            per_sample_loss=ctx.per_sample_loss.to(dtype),
            proxies=ctx.proxies.to(dtype),
            teacher=ctx.teacher.to(dtype),
        )
        selection = part.select(half)
        part.update(half, selection)
        assert selection.score.dtype is torch.float32
        kept += int(selection.keep.sum())
    assert ROWS * STEPS * 0.2 < kept <= ROWS * STEPS
    assert all(not v.is_floating_point() or v.dtype.itemsize >= 4 for v in part.state_dict().values())


@pytest.mark.parametrize("name", [n for n in FILTERS if n != "fixed"])  # a list decides by index alone
def test_broken_rows_are_dropped_and_poison_nothing(name: str) -> None:
    part = FILTERS[name]()
    live(part, stream()[:2])
    for bad in (torch.nan, torch.inf):
        ctx = stream()[2]
        for field in (ctx.embedding, ctx.logits, ctx.per_sample_loss, ctx.teacher):
            field[[0, 7]] = bad
        selection = part.select(ctx)
        part.update(ctx, selection)
        assert selection.weight[[0, 7]].tolist() == [0, 0]
        assert selection.keep.sum() > ROWS / 4
        assert selection.stats["nonfinite"].nonzero().flatten().tolist() == [0, 7]
        state = part.state_dict()
        assert all(not v.isinf().any() for v in state.values())
        empty = ("window", "evidence")  # NaN = nothing there yet
        assert all(v.isfinite().all() for k, v in state.items() if not any(e in k for e in empty))
        if name == "consensus":  # of the rows seen, only the broken ones have none
            unseen = [2 * ROWS, 2 * ROWS + 7, *range(3 * ROWS, STEPS * ROWS)]
            assert part.evidence.isnan().nonzero().flatten().tolist() == unseen
    assert part.select(stream()[3]).keep.any()


@every_filter
def test_a_batch_of_one_row_or_none(name: str) -> None:
    part = FILTERS[name]()
    live(part, stream()[:3])
    row = rows_of(stream()[3], slice(1, 2))
    selection = part.select(row)
    part.update(row, selection)
    assert selection.weight.tolist() == [1.0]
    nothing = rows_of(row, slice(0, 0))
    selection = part.select(nothing)
    part.update(nothing, selection)
    assert selection.weight.shape == selection.score.shape == (0,)


@every_filter
def test_a_batch_of_one_class_is_not_lost(name: str) -> None:
    part = FILTERS[name]()
    live(part, stream()[:3])
    ctx = stream()[3]
    ctx = replace(ctx, label=torch.full_like(ctx.label, 2))
    selection = part.select(ctx)
    part.update(ctx, selection)
    assert selection.keep.any()
    assert not selection.weight.isnan().any()


@every_filter
def test_granularities_are_what_they_say(name: str) -> None:
    part = FILTERS[name]()
    live(part, stream())
    if "epoch" not in part.granularities:
        with pytest.raises(TypeError, match="decides per batch only"):
            part.select_scores(torch.zeros(3))
        return
    # chunks of a set, without the optional fields, as from the bank
    bare = [FilterContext(c.embedding, c.label, c.index) for c in stream()]
    score = torch.cat([part.score(c) for c in bare])
    before = {k: v.clone() for k, v in part.state_dict().items()}
    selection = part.select_scores(score)
    assert_same_state(before, {k: v.clone() for k, v in part.state_dict().items()})
    assert 0.2 * len(score) < int(selection.keep.sum()) < 0.9 * len(score)


# ---- in a run ---------------------------------------------------------------------------------------


SCHEDULE = ScheduleConfig("constant", 0)  # the runs have fewer steps than the usual warm-up


def softmax() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"loss": CosineSoftmaxLoss(10, 16), "memory_size": 0}


CALLBACKS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "prism_proxy": (lambda: callbacks.PRISM(0.5, similarity="proxy"), softmax),
    "bare": (lambda: callbacks.BARE(), softmax),
    "bare_centers": (lambda: callbacks.BARE(0.5, "centers"), dict),
    "small_loss": (lambda: callbacks.SmallLoss(0.5, ramp_epochs=0), softmax),
    "small_loss_of_pairs": (lambda: callbacks.SmallLoss(0.5, ramp_epochs=0), dict),
    "loss_quantile": (lambda: callbacks.LossQuantile(0.5), softmax),
    "knn_vote": (lambda: callbacks.KNNVote(5), dict),
    "consensus": (lambda: callbacks.Consensus(warmup_steps=1), dict),
    "tsint": (lambda: callbacks.TSINT(teacher_momentum=0.9), lambda: {"memory_size": 0}),
}


@pytest.mark.parametrize("name", list(CALLBACKS))
def test_decisions_do_not_depend_on_clean_labels(tmp_path: Path, name: str) -> None:
    states, (make, options) = [], CALLBACKS[name]
    for scramble in (False, True):
        data, net = digits(), module(**options(), schedule=SCHEDULE)
        if scramble:
            split = data.splits.train
            split.clean_label = split.clean_label[::-1].copy()
        run = trainer(tmp_path, 1, [make()], limit_train_batches=4, limit_val_batches=0)
        run.fit(net, data)
        states.append(state_of(net))
    assert_same_state(*states)
    ledger = net.noise_ledger
    assert int(ledger.seen.sum()) == 4 * 32
    assert int(ledger.score_count.sum()) > 32
    if name != "tsint":
        assert 0 < int(ledger.dropped.sum()) < 4 * 32


@pytest.mark.parametrize("name", ["knn_vote", "tsint"])
def test_a_compiled_backbone_changes_nothing(tmp_path: Path, monkeypatch, name: str) -> None:
    real, compiled = torch.compile, []

    def eager(fn, *args, **kwargs):  # traces as torch.compile does, but starts no C++ compiler
        compiled.append(fn)
        return real(fn, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    states, (make, options) = [], CALLBACKS[name]
    for flag in (False, True):
        net = module(**options(), schedule=SCHEDULE, compile_backbone=flag)
        run = trainer(tmp_path, 1, [make()], limit_train_batches=2, limit_val_batches=0)
        run.fit(net, digits())
        states.append(state_of(net))
    assert len(compiled) == 1
    assert states[0].keys() == states[1].keys()
    assert torch.equal(states[0]["noise_ledger.dropped"], states[1]["noise_ledger.dropped"])
    torch.testing.assert_close(states[0]["head.weight"], states[1]["head.weight"], rtol=1e-4, atol=1e-5)


def test_costly_inputs_are_computed_only_for_a_filter_that_asks() -> None:
    chain = FilterChain()
    calls: list[Any] = []

    def teacher(batch: Any) -> torch.Tensor:
        calls.append(batch)
        return torch.ones(2, 3)

    chain.sources["teacher"] = teacher
    chain["tsint"], chain["loss"] = TSINT(CLASSES), SmallLoss()
    assert chain.from_sources("batch") == {}  # switched off
    chain.mode["loss"] = "batch"
    assert chain.wants("per_sample_loss")
    assert not chain.wants("teacher")
    assert chain.from_sources("batch") == {}
    assert calls == []
    chain.mode["tsint"] = "batch"
    assert chain.from_sources("batch")["teacher"].shape == (2, 3)
    assert calls == ["batch"]
    ctx = FilterContext(torch.ones(2, 2), torch.zeros(2).long(), torch.arange(2))
    with pytest.raises(ValueError, match="needs `teacher`, but the module's step gives none: attach"):
        chain.select(ctx)
