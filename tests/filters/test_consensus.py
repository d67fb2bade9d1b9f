"""Consensus against slow loops and closed forms, and on data with known wrong labels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lightning_nrml.filters import Consensus
from lightning_nrml.filters.consensus import SideClassifier, other_class
from lightning_nrml.filters.groups import ClassFloors, Histogram, TwoGroups
from lightning_nrml.memory.centers import SampleCenters
from lightning_nrml.types import FilterContext, Selection

C, D, N = 5, 16, 60


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clusters(rate, n=600, classes=10, dim=16, spread=0.25, seed=0):
    """Embeddings around class directions, given and clean labels; ``draw(i)`` gives fresh embeddings."""
    g = torch.Generator().manual_seed(seed)
    direction = F.normalize(torch.randn(classes, dim, generator=g), dim=1)
    clean = torch.arange(n) % classes
    shift = torch.randint(1, classes, (n,), generator=g)
    given = torch.where(torch.rand(n, generator=g) < rate, (clean + shift) % classes, clean)

    def draw(i):
        return F.normalize(direction[clean[i]] + spread * torch.randn(len(i), dim, generator=g), dim=1)

    return draw, given, clean, g


def run(part, rate, steps=200, batch=64, **kwargs):
    draw, given, clean, g = clusters(rate, n=part.num_samples, **kwargs)
    kept, right, truth = 0, 0, 0
    for t in range(steps):
        i = torch.randint(0, part.num_samples, (batch,), generator=g)
        ctx = FilterContext(draw(i), given[i], i, step=t)
        selection = part.select(ctx)
        part.update(ctx, selection)
        if t >= steps // 2:
            ok = given[i] == clean[i]
            kept += int(selection.keep.sum())
            right += int((selection.keep & ok).sum())
            truth += int(ok.sum())
    return right / kept, right / truth, float(selection.stats["noise_rate"]), given, clean


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_finds_wrong_labels_and_their_share_without_being_told(rate):
    part = Consensus(10, 16, 600, warmup_steps=20)
    precision, recall, found, given, clean = run(part, rate)
    assert precision > 0.97
    assert recall > 0.95
    assert found == pytest.approx(float((given != clean).float().mean()), abs=0.05)
    suggested = part.suggest(FilterContext(part.bank.memory[:200], given[:200], torch.arange(200)))
    there = part.bank.memory_label[:200] >= 0
    assert (suggested == clean[:200])[there].float().mean() > 0.95


def test_memory_scores_equal_a_slow_loop():
    part = Consensus(C, D, N, warmup_steps=0)
    index, label = torch.arange(40), torch.arange(40) % C
    z = F.normalize(unit(C, D, seed=2)[label] + 0.5 * unit(40, D), dim=1)
    part.bank.remember(index, z, label, torch.arange(40) % 3 > 0)
    rows, i, y = (
        unit(7, D, seed=1),
        torch.tensor([0, 1, 2, 3, 50, 51, 52]),
        torch.tensor([0, 1, 2, 3, 4, 0, 1]),
    )
    memory, owner = part.bank.memory.double(), part.bank.memory_label
    top, pairs = 0.0, 0
    for c in range(C):
        z = memory[owner == c]
        top += float((z @ z.T).sum() - len(z))
        pairs += len(z) * (len(z) - 1)
    r2 = max(top, 0) / pairs
    kappa = math.sqrt(r2) * (D - r2) / (1 - r2)
    for k in range(7):
        for c in range(C):
            mine = (owner == c) & ((torch.arange(N) != i[k]) | (c != int(y[k])))
            expected = kappa * float(F.normalize(memory[mine].sum(dim=0), dim=0) @ rows[k].double())
            found = part._memory_scores(rows, i, y)[k, c]
            assert float(found) == pytest.approx(expected, abs=1e-4)


def test_a_sample_does_not_vote_for_itself():
    part = Consensus(2, D, N, warmup_steps=0)
    z = unit(2, D)
    part.bank.remember(torch.tensor([0, 1]), z, torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool))
    scores = part._memory_scores(z[:1], torch.tensor([0]), torch.tensor([0]))
    assert scores[0, 0].isnan()  # nobody else in the class
    assert part._memory_scores(z[:1], torch.tensor([7]), torch.tensor([0])).isfinite().all()


def test_sample_centers_stay_exact_with_repeats_and_departures():
    bank = SampleCenters(C, D, N)
    g = torch.Generator().manual_seed(0)
    for t in range(30):
        i = torch.randint(0, 12, (20,), generator=g)  # repeats in every batch
        y, keep = torch.randint(0, C, (20,), generator=g), torch.rand(20, generator=g) < 0.7
        z = unit(20, D, seed=t)
        bank.remember(i, z, y, keep)
        for sample in i.unique():
            last = int((i == sample).nonzero().max())
            assert int(bank.memory_label[sample]) == (int(y[last]) if keep[last] else -1)
            if keep[last]:
                torch.testing.assert_close(bank.memory[sample], z[last])
    again = copy.deepcopy(bank)
    again.rebuild()
    for name, value in bank.named_buffers():
        assert torch.equal(value, again.get_buffer(name)), name


def test_evidence_is_a_running_mean_without_start_bias():
    part = Consensus(10, 16, 600, warmup_steps=0, smoothing=0.7)
    draw, given, _, _ = clusters(0.3)
    i, opinions = torch.arange(64), []
    for _ in range(5):
        ctx = FilterContext(draw(i), given[:64], i)
        before, weight = part.evidence[:64].clone(), part.evidence_weight[:64].clone()
        part.update(ctx, Selection.keep_all(ctx.label))
        after, new = part.evidence[:64], part.evidence_weight[:64]
        opinions.append((after * new - 0.7 * before.nan_to_num(0.0) * weight) / 0.3)
    expected = sum(0.3 * 0.7 ** (4 - k) * x for k, x in enumerate(opinions)) / (1 - 0.7**5)
    torch.testing.assert_close(part.evidence[:64], expected, atol=1e-4, rtol=1e-4)
    assert all((x.abs() <= 3 + 1e-4).all() for x in opinions)


@pytest.mark.parametrize(("samples", "weight"), [(600, 1.0), (200, 0.16)])
def test_opinion_is_a_mean_in_which_small_classes_mute_the_classifier(samples, weight):
    part = Consensus(10, 16, samples, warmup_steps=10)
    draw, given, _, g = clusters(0.3, n=samples)

    def context(i):
        logits = torch.randn(len(i), 10, generator=g) + F.one_hot(given[i], 10)
        return FilterContext(draw(i), given[i], i, logits=logits)

    for t in range(40):
        i = torch.arange(64 * t, 64 * t + 64) % (samples - 60)
        ctx = context(i)
        part.update(ctx, part.select(ctx))
    i = torch.arange(samples - 60, samples)  # never seen: their evidence is the opinion
    ctx, before = context(i), copy.deepcopy(part)
    part.update(ctx, part.select(ctx))
    rows, _, _ = before.bank.unit_rows(ctx.embedding, ctx.label)
    z = []
    for k, table in enumerate([before._memory_scores(rows, i, given[i]), ctx.logits]):
        log_prob = table.double().log_softmax(dim=1)[torch.arange(60), given[i]]
        odds = log_prob - torch.log1p(-log_prob.exp())
        mean = 0.95 * before.opinion_mean[k] + 0.05 * odds.mean()
        var = 0.95 * before.opinion_var[k] + 0.05 * odds.var()
        z.append(((odds - mean) / var.sqrt()).clamp(-3, 3))
    torch.testing.assert_close(
        part.evidence[i].double(), (z[0] + weight * z[1]) / (1 + weight), rtol=0, atol=2e-3
    )


def test_histogram_holds_the_evidence_on_record_once():
    part = Consensus(10, 16, 600, warmup_steps=5)
    run(part, 0.4, steps=60)  # samples come back, also twice in one batch
    for evidence, histogram in (
        (part.evidence, part.groups.values),
        (part.other_evidence, part.groups.low),
    ):
        assert torch.equal(histogram.counts, filled(evidence).counts)
    floors = ClassFloors(10, 600)
    _, given, _, _ = clusters(0.4)
    floors.replace(torch.arange(600), nothing(part.evidence), part.evidence, given, part.evidence > -9)
    assert torch.equal(part.floors.counts, floors.counts)


def test_decisions_do_not_depend_on_the_order_of_the_batch():
    first, second = (Consensus(10, 16, 600, warmup_steps=3) for _ in range(2))
    draw, given, _, g = clusters(0.4)
    for _ in range(20):
        i = torch.randperm(600, generator=g)[:64]
        z, order = draw(i), torch.randperm(64, generator=g)
        one = first.select(FilterContext(z, given[i], i))
        two = second.select(FilterContext(z[order], given[i][order], i[order]))
        assert torch.equal(one.weight[order], two.weight)
        torch.testing.assert_close(one.score[order], two.score, atol=1e-3, rtol=1e-3, equal_nan=True)
        first.update(FilterContext(z, given[i], i), one)
        second.update(FilterContext(z[order], given[i][order], i[order]), two)


def test_warm_up_keeps_everything():
    part = Consensus(10, 16, 600, warmup_steps=5)
    draw, given, _, g = clusters(0.5)
    for t in range(8):
        i = torch.randint(0, 600, (256,), generator=g)
        selection = part.select(FilterContext(draw(i), given[i], i))
        assert bool(selection.keep.all()) == (t < 5)
        assert bool(selection.threshold.isnan()) == (t < 5)
        part.update(FilterContext(draw(i), given[i], i), selection)


def test_broken_rows_are_dropped_and_leave_no_trace():
    part = Consensus(10, 16, 600, warmup_steps=0)
    draw, given, _, _ = clusters(0.5)
    i = torch.arange(32)
    z = draw(i)
    z[3] = math.nan
    z[4, 0] = math.inf
    for _ in range(3):
        ctx = FilterContext(z, given[i], i)
        selection = part.select(ctx)
        assert selection.weight[3:5].tolist() == [0, 0]
        assert selection.stats["nonfinite"].nonzero().squeeze(1).tolist() == [3, 4]
        part.update(ctx, selection)
    assert part.evidence[3:5].isnan().all()
    assert (part.bank.memory_label[3:5] == -1).all()
    for name, value in part.named_buffers():
        if name not in ("evidence", "other_evidence", "opinion_mean", "opinion_var"):
            assert value.isfinite().all() if value.is_floating_point() else True, name
    assert part.opinion_mean.isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_tiny_batches(rows):
    part = Consensus(3, D, N, warmup_steps=0)
    for _ in range(4):
        ctx = FilterContext(unit(rows, D), torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
        selection = part.select(ctx)
        part.update(ctx, selection)
        assert selection.weight.shape == (rows,)
        assert selection.keep.all()


def test_restored_state_goes_on_bit_for_bit():
    one = Consensus(10, 16, 600, warmup_steps=5)
    run(one, 0.4, steps=20)
    two = Consensus(10, 16, 600, warmup_steps=5)
    two.load_state_dict(one.state_dict())
    assert run(one, 0.4, steps=10, seed=1)[:3] == run(two, 0.4, steps=10, seed=1)[:3]
    for name, value in one.state_dict().items():
        assert torch.equal(value.nan_to_num(9), two.state_dict()[name].nan_to_num(9)), name


def test_whole_set_scores_are_the_evidence_on_record():
    part = Consensus(10, 16, 600, warmup_steps=20)
    _, _, _, given, clean = run(part, 0.4)
    everyone = torch.arange(600)
    score = part.score(FilterContext(part.bank.memory, given, everyone))
    selection = part.select_scores(score)
    assert ((given == clean) == selection.keep).float().mean() > 0.97
    unseen = Consensus(10, 16, 600)
    assert unseen.select_scores(unseen.score(FilterContext(unit(600, 16), given, everyone))).keep.all()


def test_the_modules_own_classifier_comes_first():
    def agreement(with_logits):
        part = Consensus(10, 16, 600, warmup_steps=10)
        draw, given, clean, g = clusters(0.5, spread=3.0)  # embeddings say next to nothing
        for _ in range(60):
            i = torch.randint(0, 600, (64,), generator=g)
            logits = 5 * F.one_hot(clean[i], 10).float() if with_logits else None
            ctx = FilterContext(draw(i), given[i], i, logits=logits)
            selection = part.select(ctx)
            part.update(ctx, selection)
        return float((selection.keep == (given[i] == clean[i])).float().mean())

    assert agreement(True) > 0.85
    assert agreement(True) > agreement(False) + 0.1
    with pytest.raises(ValueError, match=r"needs logits \(2, 10\)"):
        Consensus(10, 16, 600).select(
            FilterContext(unit(2, 16), torch.zeros(2).long(), torch.arange(2), logits=torch.zeros(2, 3))
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embedding_dim": 1}, "embedding_dim"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"smoothing": 1.0}, "smoothing"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Consensus(**{"num_classes": 3, "embedding_dim": 4, "num_samples": 5, **kwargs})


def test_a_label_outside_the_classes_is_named():
    part = Consensus(3, D, N)
    with pytest.raises(ValueError, match=r"label 7 is outside 0\.\.2"):
        part.select(FilterContext(unit(2, D), torch.tensor([1, 7]), torch.arange(2)))


def test_side_classifier_is_adam_on_the_cross_entropy():
    part = SideClassifier(C, D)
    weight = torch.zeros(C, D, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=3e-3)
    for t in range(5):
        z, y = unit(20, D, seed=t), torch.arange(20) % C
        keep = (torch.arange(20) % 3 > 0).float()
        part.learn(z, y, keep)
        loss = F.cross_entropy(16 * z @ weight.T, y, reduction="none")
        adam.zero_grad()
        ((loss * keep).sum() / keep.sum()).backward()
        adam.step()
        torch.testing.assert_close(part.weight, weight.detach(), atol=1e-5, rtol=1e-3)
    part.learn(z, y, torch.zeros(20))
    assert part.weight.isfinite().all()


def nothing(x):
    return torch.full_like(x, torch.nan)


def filled(values):
    histogram = Histogram()
    histogram.replace(nothing(values), values, torch.ones_like(values, dtype=torch.bool))
    return histogram


def two_groups(share, apart, n=200_000, **kwargs):
    """Groups of normal values, the high ones ``apart`` deviations above the low ones."""
    g = torch.Generator().manual_seed(0)
    groups, yes = TwoGroups(**kwargs), torch.ones(n, dtype=torch.bool)
    high = torch.arange(n) >= share * n
    values = 0.5 * (torch.randn(n, generator=g) + apart * high) - 1
    groups.values.replace(nothing(values), values, yes)
    groups.low.replace(nothing(values), 0.5 * torch.randn(n, generator=g) - 1, yes)
    return groups, values, high


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.6])
def test_share_and_odds_of_groups_far_apart(share):
    groups, values, high = two_groups(share, apart=4.0)
    assert float(groups.low_share()) == pytest.approx(share, abs=0.005)
    assert float(groups.cut()[1]) == pytest.approx(share, abs=0.03)
    odds = groups.log_odds(values)
    assert ((odds > 0) == high).double().mean() > 0.97
    # the slope of two normal distributions of deviation 1/2 whose means are 2 apart
    slope = (groups.log_odds(torch.tensor(0.2)) - groups.log_odds(torch.tensor(0.1))) / 0.1
    assert float(slope) == pytest.approx(2 / 0.25, rel=0.05)
    assert groups.log_odds(torch.tensor([torch.nan])).isnan().all()


def test_the_share_of_groups_that_overlap_is_an_upper_bound_by_storeys_integral():
    groups, _, _ = two_groups(0.3, apart=1.0)
    q = torch.linspace(0.1, 0.4, 1001, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    mixed_in = normal.cdf(normal.icdf(q) - 1.0) / q
    assert float(groups.low_share()) == pytest.approx(0.3 + 0.7 * float(mixed_in.mean()), abs=0.01)


def test_a_valley_mends_a_share_that_the_low_end_gets_wrong():
    groups, values, high = two_groups(0.4, apart=4.0)
    yes = torch.ones_like(high)
    g = torch.Generator().manual_seed(1)
    shifted = 0.5 * torch.randn(len(values), generator=g) - 1.15  # lower than wrong labels lie
    groups.low.counts.zero_()
    groups.low.replace(nothing(shifted), shifted, yes)
    assert abs(float(groups.low_share()) - 0.4) > 0.05
    cut, share = groups.cut()
    assert float(share) == pytest.approx(0.4, abs=0.02)
    assert ((values > cut) == high).double().mean() > 0.97
    # without a valley the low end is all there is
    groups, values, _ = two_groups(0.3, apart=1.0)
    cut, share = groups.cut()
    assert share == groups.low_share()
    assert float((values < cut).double().mean()) == pytest.approx(0.75 * float(share), abs=0.01)


def test_a_told_share_moves_the_cut_only():
    groups, values, _ = two_groups(0.3, apart=1.0)
    assert float((groups.log_odds(values, 0.25) < 0).double().mean()) == pytest.approx(0.25, abs=0.002)
    assert float((groups.log_odds(values, 0.0) < 0).double().mean()) == 0


def test_high_values_among_the_low_ones_are_allowed_for():
    n, classes, rate = 200_000, 5, 0.5
    g = torch.Generator().manual_seed(0)
    wrong = torch.rand(n, generator=g) < rate
    hit = wrong & (torch.rand(n, generator=g) < 1 / (classes - 1))
    values = torch.randn(n, generator=g) * 0.2 + torch.where(wrong, -1.0, 1.0)
    low = torch.randn(n, generator=g) * 0.2 + torch.where(hit, 1.0, -1.0)
    groups, yes = TwoGroups(mixed=1 / (classes - 1)), torch.ones(n, dtype=torch.bool)
    groups.values.replace(nothing(values), values, yes)
    groups.low.replace(nothing(low), low, yes)
    assert float(groups.low_share()) == pytest.approx(rate, abs=0.01)


def test_share_without_values_and_with_all_low_ones_in_one_bin():
    groups = TwoGroups()
    assert float(groups.low_share()) == 0
    assert groups.log_odds(torch.tensor([-3.0, 0.0, 3.0])).isfinite().all()
    yes = torch.ones(100, dtype=torch.bool)
    groups.low.replace(torch.full((100,), torch.nan), torch.full((100,), -9.0), yes)
    values = torch.where(torch.arange(100) < 20, -9.0, 1.0)
    groups.values.replace(nothing(values), values, yes)
    assert float(groups.low_share()) == pytest.approx(0.2)


def test_a_histogram_follows_values_that_move_and_knows_quantiles():
    x, yes = torch.linspace(-2, 2, 51), torch.ones(51, dtype=torch.bool)
    histogram, moved = filled(x), torch.where(torch.arange(51) < 10, x + 0.5, x)
    histogram.replace(x, x + 0.5, torch.arange(51) < 10)
    assert torch.equal(histogram.counts, filled(moved).counts)
    assert float(filled(x).quantile(torch.tensor(0.5))) == pytest.approx(0, abs=0.05)
    assert float(filled(x).mean()) == pytest.approx(0, abs=0.02)
    assert float(filled(x).variance()) == pytest.approx(float(x.var()), rel=0.05)
    assert yes.sum() == histogram.counts.sum()


def test_class_floors_count_what_is_higher_in_the_class():
    g = torch.Generator().manual_seed(0)
    floors, label = ClassFloors(4, 80), torch.arange(80) % 4
    x = 1.2 * torch.randn(80, generator=g)
    everyone, yes = torch.arange(80), torch.ones(80, dtype=torch.bool)
    floors.replace(everyone, nothing(x), x, label, yes)
    place = ((x.clamp(-3, 3 - 1e-6) + 3) * (64 / 6)).floor()
    for share in (0.1, 0.5):
        above = torch.stack([((place > p) & (label == y)).sum() for p, y in zip(place, label, strict=True)])
        assert torch.equal(floors.among_best(x, label, share), above < share * 20)
    # a sample of another class takes its count along
    other = torch.where(everyone < 40, (label + 1) % 4, label)
    floors.replace(everyone, x, x, other, yes)
    again = ClassFloors(4, 80)
    again.replace(everyone, nothing(x), x, other, yes)
    assert torch.equal(floors.counts, again.counts)
    assert not floors.among_best(nothing(x), label, 0.5).any()


def test_no_class_loses_all_its_samples():
    part = Consensus(10, 16, 600, warmup_steps=20)
    _, _, _, given, clean = run(part, 0.4)
    everyone, yes = torch.arange(600), torch.ones(600, dtype=torch.bool)
    low = part.evidence.masked_fill(given == 3, -2.0) + 0.01 * torch.arange(600) / 600
    part.groups.values.replace(part.evidence, low, yes)
    part.floors.replace(everyone, part.evidence, low, given, yes)
    part.evidence.copy_(low)
    score = part.score(FilterContext(part.bank.memory, given, everyone))
    assert part.select_scores(score).keep[given == 3].all()  # equal ones go together
    low = torch.where(given == 3, -1 - torch.arange(600) / 600, part.evidence)
    part.groups.values.replace(part.evidence, low, yes)
    part.floors.replace(everyone, part.evidence, low, given, yes)
    part.evidence.copy_(low)
    score = part.score(FilterContext(part.bank.memory, given, everyone))
    keep = part.select_scores(score).keep
    assert float(keep[given == 3].float().mean()) == pytest.approx(0.15, abs=0.08)
    assert part.evidence[(given == 3) & keep].min() > part.evidence[(given == 3) & ~keep].max()
    others = given != 3
    assert (keep == (given == clean))[others].float().mean() > 0.97


def test_clean_labels_are_left_alone():
    part = Consensus(10, 16, 600, warmup_steps=20)
    _, recall, found, _, _ = run(part, 0.0, spread=0.4)
    assert found < 0.01
    assert recall > 0.99


def test_a_told_rate_is_dropped_though_the_evidence_says_nothing():
    part = Consensus(10, 16, 600, warmup_steps=20, noise_rate=0.3)
    _, _, _, given, _ = run(part, 0.0, spread=0.4)
    kept = part.select_scores(part.score(FilterContext(part.bank.memory, given, torch.arange(600)))).keep
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("classes", [2, 10, 964])
def test_the_other_class_is_any_but_the_given_one_and_stays(classes):
    index = torch.arange(50_000)
    label = index % classes
    other = other_class(index, label, classes)
    assert not (other == label).any()
    step = (other - label) % classes
    count = torch.bincount(step, minlength=classes)[1:].double()
    expected = 50_000 / (classes - 1)
    assert (count - expected).abs().max() < 5 * expected**0.5
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other_class(index[order], label[order], classes), other[order])


def test_a_label_that_is_not_on_record_is_judged_by_itself():
    """What correction asks: is the suggested label likelier than the given one?"""
    part = Consensus(10, 16, 600, warmup_steps=20)
    *_, given, clean = run(part, 0.4)
    draw, *_ = clusters(0.4)
    wrong = (given != clean).nonzero()[:, 0]
    z = draw(wrong)
    as_given, as_true = (part.score(FilterContext(z, label[wrong], wrong)) for label in (given, clean))
    half = math.log(0.5)
    assert (as_given < half).float().mean() > 0.95
    assert (as_true > half).float().mean() > 0.95
    # the given label is judged by the record, not by the embedding at hand
    assert torch.equal(as_given, part.score(FilterContext(-z, given[wrong], wrong)))


def test_a_corrected_label_begins_with_evidence_of_its_own():
    part = Consensus(10, 16, 600, warmup_steps=20)
    *_, given, clean = run(part, 0.4)
    draw, *_ = clusters(0.4)
    wrong = (given != clean).nonzero()[:64, 0]
    before = part.evidence[wrong].clone()
    ctx = FilterContext(draw(wrong), clean[wrong], wrong)
    fresh = part._judge(ctx)["opinion"]
    part.update(ctx, part.select(ctx))
    torch.testing.assert_close(part.evidence[wrong], fresh)  # nothing of the wrong label's is left in it
    assert (fresh > before).float().mean() > 0.95
