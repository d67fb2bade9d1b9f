"""MultiLabelPRISM against slow loops and closed forms, and on data with known extra and missing labels."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_same_state, state_of, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lightning_nrml.callbacks import MultiLabelPRISM as PRISMCallback
from lightning_nrml.filters import MultiLabelPRISM
from lightning_nrml.filters.chain import gathered_context
from lightning_nrml.filters.label_groups import LabelGroups
from lightning_nrml.types import FilterContext, Selection

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modules"))
from test_multilabel import LABELS, data, module

N, L, D = 400, 4, 12
PREVALENCE = torch.tensor([0.5, 0.3, 0.2, 0.08])


class Scene:
    """Samples whose embedding adds up their labels' directions, with mixed noise of a rate."""

    def __init__(self, rate: float = 0.4, seed: int = 0, spread: float = 0.35) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.clean = (torch.rand(N, L, generator=self.g) < PREVALENCE).long()
        self.direction = F.normalize(torch.randn(L, D, generator=self.g), dim=1)
        self.given, self.spread = self.clean.clone(), spread
        for c in range(L):
            for value in (0, 1):
                own = (self.clean[:, c] == value).nonzero().flatten()
                count = int(rate * int(self.clean[:, c].sum()))
                self.given[own[torch.randperm(len(own), generator=self.g)[:count]], c] = 1 - value

    def context(self, index: torch.Tensor, logits: bool = True) -> FilterContext:
        noise = self.spread * torch.randn(len(index), D, generator=self.g)
        z = F.normalize(self.clean[index].float() @ self.direction + 0.3 + noise, dim=1)
        own = 3 * (z @ self.direction.T) + 0.3 * torch.randn(len(index), L, generator=self.g)
        return FilterContext(z, self.given[index], index, logits=own if logits else None)

    def live(self, part: MultiLabelPRISM, steps: int, rows: int = 50, logits: bool = True) -> list[Selection]:
        found = []
        for _ in range(steps):
            ctx = self.context(torch.randperm(N, generator=self.g)[:rows], logits)
            found.append(part.select(ctx))
            part.update(ctx, found[-1])
        return found


def prism(**kwargs) -> MultiLabelPRISM:
    return MultiLabelPRISM(L, D, N, **{"warmup_steps": 20, **kwargs})


def whole(scene: Scene, part: MultiLabelPRISM) -> torch.Tensor:
    everyone = torch.arange(N)
    return part.score(FilterContext(torch.zeros(N, D), scene.given, everyone))


@pytest.mark.parametrize("judges", ["both", "classifier", "memory"])
def test_finds_extra_and_missing_labels_of_frequent_and_rare_ones(judges):
    scene, part = Scene(), prism(judges=judges)
    scene.live(part, 160)
    score, wrong = whole(scene, part), scene.given != scene.clean
    for c in range(L):
        for value in (0, 1):
            own = scene.given[:, c] == value
            bad, good = score[own & wrong[:, c], c], score[own & ~wrong[:, c], c]
            assert (bad[:, None] < good).float().mean() > 0.85, (c, value)
    said = score < math.log(0.5)
    assert (said & wrong).sum() / said.sum() > 0.8
    assert (said & wrong).sum() / wrong.sum() > 0.6


def test_rates_of_both_kinds_are_found_without_being_told():
    scene, part = Scene(), prism()
    rates = scene.live(part, 200)[-1].stats
    wrong, given = scene.given != scene.clean, scene.given > 0
    assert float(rates["extra_rate"]) == pytest.approx(float((wrong & given).sum() / given.sum()), abs=0.08)
    assert float(rates["missing_rate"]) == pytest.approx(
        float((wrong & ~given).sum() / (~given).sum()), abs=0.05
    )
    clean = Scene(rate=0.0)
    found = clean.live(part := prism(), 200)[-1].stats
    assert float(found["extra_rate"]) < 0.1
    assert float(found["missing_rate"]) < 0.05
    assert (whole(clean, part) < math.log(0.5)).float().mean() < 0.05


def test_evidence_and_score_equal_a_slow_loop():
    scene, part = Scene(), prism(smoothing=0.6, warmup_steps=3)
    mean, var = torch.full((2, L), math.nan), torch.full((2, L), math.nan)
    evidence, weight, memory = {}, {}, {}
    for step in range(8):
        index = torch.randperm(40, generator=scene.g)[:12]
        ctx = scene.context(index)
        selection = part.select(ctx)
        told = torch.full((2, 12, L), math.nan)
        for row, i in enumerate(index.tolist()):
            for c in range(L):
                kinds = []
                for value in (1, 0):
                    others = [
                        float(z @ ctx.embedding[row])
                        for j, (z, y, t) in memory.items()
                        if j != i and t[c] and y[c] == value
                    ]
                    kinds.append(sum(others) / len(others) if others else math.nan)
                told[0, row, c] = kinds[0] - kinds[1]
                told[1, row, c] = ctx.logits[row, c]
        for judge in (0, 1):
            for c in range(L):
                values = told[judge, :, c][~told[judge, :, c].isnan()]
                if len(values) >= 8:
                    old = 0.0 if mean[judge, c].isnan() else 0.95
                    mean[judge, c] = (
                        values.mean() if not old else 0.95 * mean[judge, c] + 0.05 * values.mean()
                    )
                    var[judge, c] = values.var() if not old else 0.95 * var[judge, c] + 0.05 * values.var()
        for row, i in enumerate(index.tolist()):
            for c in range(L):
                z = [float((told[j, row, c] - mean[j, c]) / var[j, c].sqrt()) for j in (0, 1)]
                z = [min(max(v, -3.0), 3.0) for v in z if not math.isnan(v)]
                opinion, w = sum(z) / len(z), weight.get(i, 0.0)
                new = 0.6 * w + 0.4
                held = evidence.get((i, c), 0.0)
                evidence[i, c] = (0.6 * w * held + 0.4 * opinion) / new
        for i in index.tolist():
            weight[i] = 0.6 * weight.get(i, 0.0) + 0.4
        if step == 7:  # Bayes' rule by hand, from the distributions that the groups hold
            low, high = part.groups.mean.tolist()
            for row, i in enumerate(index.tolist()):
                for c in range(L):
                    e, s = evidence[i, c], float(part.groups.deviation[c])
                    density = [math.exp(-((e - m) ** 2) / 2 / s**2) for m in (low[c], high[c])]
                    missing, extra = part.groups.rate[:, c].tolist()
                    y = int(ctx.label[row, c])
                    prior = [extra, 1 - extra] if y else [1 - missing, missing]
                    joint = [p * d for p, d in zip(prior, density, strict=True)]
                    want = joint[y] / sum(joint) if part.groups.two()[c] else 0.999
                    assert float(selection.score[row, c].exp()) == pytest.approx(want, abs=1e-4)
            assert part.groups.two().any()
        part.update(ctx, selection)
        for row, i in enumerate(index.tolist()):
            memory[i] = ctx.embedding[row], ctx.label[row].tolist(), (selection.weight[row] >= 0.5).tolist()
    for (i, c), value in evidence.items():
        assert float(part.evidence[i, c]) == pytest.approx(value, abs=1e-4)
    assert part.evidence[40:].isnan().all()


def test_groups_equal_expectation_maximisation_by_hand():
    g = torch.Generator().manual_seed(0)
    label = (torch.rand(500, 2, generator=g) < torch.tensor([0.4, 0.1])).long()
    value = (torch.randn(500, 2, generator=g) * 0.6 + label).clamp(-2.9, 2.9)
    groups = LabelGroups(2)
    value = (((value + 3) * 128 / 6).long().double() + 0.5) * 6 / 128 - 3  # the middles of the bins
    nothing = torch.full_like(value, torch.nan)
    groups.replace(nothing, value, label, torch.ones(500, dtype=torch.bool))
    groups.fit(torch.tensor(True))
    rate, mean, sd = torch.full((2, 2), 0.1), torch.zeros(2, 2), torch.zeros(2)
    for c in range(2):
        mean[:, c] = torch.stack([value[label[:, c] == v, c].mean() for v in (0, 1)])
        sd[c] = ((value[:, c] - mean[label[:, c], c]) ** 2).mean().sqrt()
    torch.testing.assert_close(groups.mean.float(), mean)
    torch.testing.assert_close(groups.deviation.float(), sd)
    assert groups.rate.flatten().tolist() == [0.1] * 4
    for _ in range(3):
        groups.fit(torch.tensor(False))
        wrong, given = torch.zeros(2, 2), torch.zeros(2, 2)
        for c in range(2):
            x, y = value[:, c].float(), label[:, c]
            likely = torch.stack([torch.exp(-((x - m) ** 2) / 2 / sd[c] ** 2) for m in mean[:, c]])
            prior = torch.stack([torch.where(y > 0, rate[1, c], 1 - rate[0, c])])
            joint = torch.cat([prior, 1 - prior]) * likely
            q = joint / joint.sum(0)
            mean[:, c] = (q * x).sum(1) / q.sum(1)
            sd[c] = ((q * (x - mean[:, c : c + 1]) ** 2).sum() / 500).sqrt()
            wrong[:, c] = torch.stack([q[1][y == 0].sum(), q[0][y == 1].sum()])
            given[:, c] = torch.stack([(y == 0).sum(), (y == 1).sum()]).float()
        common = wrong.sum(1, keepdim=True) / given.sum(1, keepdim=True)
        rate = (wrong + 20 * common) / (given + 20)
        torch.testing.assert_close(groups.mean.float(), mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(groups.rate.float(), rate, atol=1e-4, rtol=1e-3)
    before = groups.counts.clone()
    groups.replace(value[:9], value[:9] + 0.3, label[:9], torch.arange(9) < 5)
    assert int(groups.counts.sum()) == 1000
    assert not torch.equal(groups.counts, before)
    groups.replace(value[:9] + 0.3, value[:9], label[:9], torch.arange(9) < 5)
    assert torch.equal(groups.counts, before)


def test_a_given_noise_rate_fixes_the_rates():
    scene, part = Scene(), prism(noise_rate=0.25)
    rates = scene.live(part, 60)[-1].stats["label_rates"]
    given = part.groups.counts.sum(dim=2)
    assert rates[1].tolist() == pytest.approx([0.25] * L)
    torch.testing.assert_close(rates[0], (0.25 * given[1] / given[0]).float(), rtol=0.05, atol=0.01)


def test_labels_that_form_one_group_are_taken_for_right():
    groups = LabelGroups(1)
    value, label = torch.zeros(50, 1), (torch.arange(50) % 2)[:, None]
    groups.replace(torch.full_like(value, torch.nan), value, label, torch.ones(50, dtype=torch.bool))
    for restart in (True, False, False):
        groups.fit(torch.tensor(restart))
    assert not groups.two().any()
    assert groups.rates().sum() == 0
    assert (groups.log_odds(value, label) > 5).all()
    assert groups.log_odds(torch.full((1, 1), torch.nan), label[:1]).isnan().all()


@pytest.mark.parametrize("weighting", ["soft", "hard"])
def test_weights_follow_the_score_after_the_warm_up(weighting):
    scene, part = Scene(), prism(weighting=weighting, warmup_steps=5)
    for step, selection in enumerate(scene.live(part, 60)):
        if step < 5:
            assert (selection.weight == 1).all()
            assert selection.threshold.isnan()
            continue
        known = ~selection.score.isnan()
        p = selection.score.exp()
        want = p if weighting == "soft" else (p >= 0.5).float()
        torch.testing.assert_close(selection.weight[known], want[known])
        assert (selection.weight[~known] == 1).all()
        assert float(selection.threshold.exp()) == pytest.approx(0.5)
        assert selection.weight.dtype is selection.score.dtype is torch.float32
    assert 0 < (selection.weight < 0.5).sum() < selection.weight.numel() / 2


def test_groups_learn_from_the_first_batch_after_the_warm_up():
    """Until then they start anew from the given labels, with one tenth wrong."""
    scene, part = Scene(), prism(warmup_steps=5)
    scene.live(part, 5)
    assert (part.groups.rate == 0.1).all()
    scene.live(part, 1)
    assert (part.groups.rate != 0.1).all()


def test_the_order_of_the_batch_does_not_matter():
    one, two, scene = prism(warmup_steps=4), prism(warmup_steps=4), Scene()
    for _ in range(25):
        ctx = scene.context(torch.randperm(N, generator=scene.g)[:60])
        order = torch.randperm(60, generator=scene.g)
        fields = ("embedding", "label", "index", "logits")
        other = replace(ctx, **{name: getattr(ctx, name)[order] for name in fields})
        first, second = one.select(ctx), two.select(other)
        torch.testing.assert_close(second.weight, first.weight[order], atol=1e-4, rtol=1e-4)
        one.update(ctx, first)
        two.update(other, second)


def test_restored_state_goes_on_bit_for_bit():
    want, first, second = prism(warmup_steps=4), prism(warmup_steps=4), prism(warmup_steps=4)
    wanted = Scene().live(want, 20)
    scene = Scene()
    scene.live(first, 10)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one, two in zip(scene.live(second, 10), wanted[10:], strict=True):
        assert torch.equal(one.weight, two.weight)
    assert_same_state(want.state_dict(), second.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    part, scene = prism(warmup_steps=4).to(dtype), Scene()
    for _ in range(30):
        ctx = scene.context(torch.randperm(N, generator=scene.g)[:60])
        half, _ = gathered_context(
            embedding=ctx.embedding.to(dtype), label=ctx.label, index=ctx.index, logits=ctx.logits.to(dtype)
        )
        selection = part.select(half)
        part.update(half, selection)
    wrong = ctx.label != scene.clean[ctx.index]
    assert selection.weight[wrong].mean() < selection.weight[~wrong].mean() - 0.3
    assert all(not v.is_floating_point() or v.dtype.itemsize >= 4 for v in part.state_dict().values())


def test_broken_rows_are_dropped_and_leave_no_trace():
    part, scene = prism(warmup_steps=4), Scene()
    scene.live(part, 8)
    ctx = scene.context(torch.arange(20))
    known = part.evidence[:20].clone()
    ctx.embedding[3] = math.nan
    ctx.logits[7, 1] = math.inf
    selection = part.select(ctx)
    part.update(ctx, selection)
    assert selection.stats["nonfinite"].nonzero().flatten().tolist() == [3, 7]
    assert selection.weight[[3, 7]].sum() == 0
    for row in (3, 7):
        assert torch.equal(part.evidence[row].nan_to_num(9), known[row].nan_to_num(9))
    for name, value in part.named_buffers():
        assert value.isfinite().all() or name == "evidence", name


@pytest.mark.parametrize("rows", [0, 1])
def test_tiny_batches(rows):
    part, scene = prism(), Scene()
    for _ in range(3):
        ctx = scene.context(torch.arange(rows))
        selection = part.select(ctx)
        part.update(ctx, selection)
        assert selection.weight.tolist() == [[1.0] * L] * rows


def test_a_label_that_nobody_has_and_dropped_labels_do_no_harm():
    part, scene = prism(warmup_steps=2), Scene()
    scene.given[:, 1] = 0
    for _ in range(30):
        ctx = scene.context(torch.randperm(N, generator=scene.g)[:60])
        selection = part.select(ctx)
        part.update(ctx, replace(selection, weight=torch.zeros_like(selection.weight)))  # all dropped
    assert selection.weight[:, 1].min() > 0.9
    assert int(part.bank.count.sum()) == 0
    assert part.opinion_mean[0].isnan().all()  # the memory stays empty and says nothing
    empty = ("evidence", "opinion_mean", "opinion_var")
    assert all(v.isfinite().all() or n in empty for n, v in part.named_buffers())
    assert whole(scene, part).isfinite().any()


def test_without_logits_the_memory_judges_alone():
    one, two, scene = prism(warmup_steps=3), prism(warmup_steps=3, judges="memory"), Scene()
    for a, b in zip(scene.live(one, 10, logits=False), Scene().live(two, 10, logits=False), strict=True):
        assert torch.equal(a.weight, b.weight)
    assert prism(judges="classifier").requires == ("logits",)
    assert prism(judges="classifier").bank is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"judges": "all"}, "judges is 'all': choose one of both, classifier, memory"),
        ({"weighting": "no"}, "weighting is 'no': choose one of soft, hard"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"noise_rate": 1.0}, "noise_rate"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prism(**kwargs)


def test_wrong_shapes_are_named():
    part, ctx = prism(), Scene().context(torch.arange(5))
    with pytest.raises(ValueError, match="use it with multi-label data, and PRISM with one class"):
        part.select(replace(ctx, label=ctx.label[:, 0]))
    with pytest.raises(ValueError, match=r"needs logits \(5, 4\), got \(5, 3\)"):
        part.select(replace(ctx, logits=ctx.logits[:, :3]))
    with pytest.raises(IndexError, match="400 samples, but got dataset index 400"):
        part.select(replace(ctx, index=ctx.index + 396))


# ---- in a run ---------------------------------------------------------------------------------------


def fit(folder, epochs=6, resume=None, source=None, name="bce"):
    net = module(name)
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    run = trainer(folder, epochs, [PRISMCallback(warmup_steps=9), saver], log_every_n_steps=1)
    run.fit(net, source or data(), ckpt_path=resume, weights_only=False if resume else None)
    return net, run


def test_in_a_run_it_finds_wrong_labels_and_resumes_bit_for_bit(tmp_path):
    net, run = fit(tmp_path / "whole", 8)
    seen = {k: float(v) for k, v in run.callback_metrics.items()}
    assert seen["noise/extra_auroc"] > 0.75
    assert seen["noise/missing_auroc"] > 0.75
    assert 0 < seen["noise/estimated_rate"] < 0.5
    assert {"noise/estimated_extra", "noise/estimated_missing", "noise/extra_precision"} <= seen.keys()
    again, _ = fit(tmp_path / "again", 8, tmp_path / "whole" / "2.ckpt")
    assert_same_state(state_of(net), state_of(again))
    assert {"filters.multilabelprism.evidence", "filters.multilabelprism.bank.total"} <= state_of(net).keys()
    assert net.noise_ledger.label_dropped.shape == (96, LABELS)


@pytest.mark.parametrize("name", ["elr", "rcml"])
def test_decisions_do_not_depend_on_clean_labels(tmp_path, name):
    states = []
    for scramble in (False, True):
        source = data()
        if scramble:
            source.splits.train.clean_label = source.splits.train.clean_label[::-1].copy()
        net, _ = fit(tmp_path / str(scramble), 3, source=source, name=name)
        states.append(state_of(net))
    assert_same_state(*states)
    assert int(net.noise_ledger.label_score_count.sum()) > 0


def test_a_told_rate_stays_a_rate_where_nearly_all_samples_have_the_label():
    groups = LabelGroups(1)
    value = torch.cat([torch.linspace(0.5, 2.5, 95), torch.linspace(-2.5, -1, 5)]).unsqueeze(1)
    label = torch.ones(100, 1, dtype=torch.int64)
    label[95:] = 0
    groups.replace(torch.full_like(value, torch.nan), value, label, torch.ones(100, dtype=torch.bool))
    for restart in (True, False, False):
        groups.fit(torch.tensor(restart), noise_rate=0.5)
    # as many missing as extra ones would be 47 of 5 samples
    assert groups.rate[:, 0].tolist() == pytest.approx([0.7, 0.5])
    odds = groups.log_odds(value, label)
    assert odds.isfinite().all()
    assert (odds[:95].diff(dim=0) >= 0).all()
