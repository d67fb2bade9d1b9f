"""PRISM against a slow loop written from the paper, its known numbers, and every known trap."""

import math
from collections import deque
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from lightning_nrml.filters import PRISM
from lightning_nrml.filters.prism import _argmax
from lightning_nrml.filters.rank_rule import _middle_mean
from lightning_nrml.filters.vmf import concentration, log_normalizer
from lightning_nrml.types import FilterContext, Selection


def context(embedding, label, index=None):
    label = torch.as_tensor(label)
    index = torch.arange(len(label)) if index is None else torch.as_tensor(index)
    return FilterContext(torch.as_tensor(embedding), label, index)


def remember(filter, embedding, label):
    ctx = context(embedding, label)
    filter.update(ctx, Selection.keep_all(ctx.label))


class SlowPRISM:
    """One sample, one class, one memory row at a time; fresh centres; float64."""

    def __init__(self, num_classes, noise_rate, memory_size, window, similarity, count_empty):
        self.num_classes, self.noise_rate, self.similarity = num_classes, noise_rate, similarity
        self.count_empty = count_empty
        self.memory = deque(maxlen=memory_size)
        self.window = deque(maxlen=window)

    def fit(self, dim):
        """Per class with rows (or per slot): direction, slope along it, and log-constant."""
        classes = {}
        for k in range(self.num_classes):
            rows = [v for v, y in self.memory if y == k]
            if not rows and not self.count_empty:
                continue
            total = sum(rows) if rows else torch.zeros(dim, dtype=torch.float64)
            rbar = total.norm() / max(len(rows), 1)
            mu = total / total.norm() if rows else total
            if self.similarity == "avg":
                classes[k] = (mu, rbar, 0.0)
            else:
                kappa = concentration(rbar, dim, PRISM.max_rbar)
                classes[k] = (mu, kappa, float(log_normalizer(kappa, dim)))
        return classes

    def log_prob(self, x, y, classes):
        if not any(label == y for _, label in self.memory):
            return math.nan
        scores = {k: float(const + slope * (mu @ x)) for k, (mu, slope, const) in classes.items()}
        top = max(scores.values())
        return scores[y] - top - math.log(sum(math.exp(s - top) for s in scores.values()))

    def step(self, embedding, label):
        rows = normalize(embedding.float()).double()
        labels = label.tolist()
        classes = self.fit(rows.shape[1])
        scores = [self.log_prob(x, y, classes) for x, y in zip(rows, labels, strict=True)]
        known = [i for i, s in enumerate(scores) if not math.isnan(s)]
        by_score = sorted(known, key=lambda i: scores[i])
        removed = by_score[: int(self.noise_rate * len(known))]
        keep = [True] * len(labels)
        if removed:
            self.window.append(scores[removed[-1]])
            if self.similarity == "avg":
                threshold = math.log(sum(math.exp(q) for q in self.window) / len(self.window))
            else:
                cut = len(self.window) // 4
                middle = sorted(self.window)[cut : len(self.window) - cut]
                threshold = sum(middle) / len(middle)
            above = [scores[i] > threshold + 1e-12 for i in known]
            if any(above):
                for i, stays in zip(known, above, strict=True):
                    keep[i] = stays
            else:
                for i in removed:
                    keep[i] = False
                self.window = deque([self.window[-1]], maxlen=self.window.maxlen)
        for x, y, stays in zip(rows, labels, keep, strict=True):
            if stays:
                self.memory.append((x, y))
        return scores, keep


def clusters(num_classes, count, dim, seed, rate, spread=1.0):
    """Unit rows around class directions; given labels, of which a share is wrong; the wrong ones."""
    g = torch.Generator().manual_seed(seed)
    centre = normalize(torch.randn(num_classes, dim, generator=g))
    clean = torch.randint(num_classes, (count,), generator=g)
    x = normalize(centre[clean] + spread * torch.randn(count, dim, generator=g) / dim**0.5)
    wrong = torch.rand(count, generator=g) < rate
    other = (clean + torch.randint(1, num_classes, (count,), generator=g)) % num_classes
    return x, torch.where(wrong, other, clean), wrong


def auroc(score, wrong):
    rank = score.double().argsort().argsort().double() + 1
    clean, bad = int((~wrong).sum()), int(wrong.sum())
    return float((rank[~wrong].sum() - clean * (clean + 1) / 2) / (clean * bad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(
    ("similarity", "count_empty"), [("avg", False), ("avg", True), ("vmf", False), ("vmf", True)]
)
def test_equals_the_slow_loop(dtype, window, similarity, count_empty):
    x, label, _ = clusters(7, 15 * 12, 6, seed=3, rate=0.4)
    label[label == 6] = 5  # slot 6 stays empty for ever
    x = (x * 3).to(dtype)
    filter = PRISM(7, 6, 0.4, 30, window, similarity, count_empty_classes=count_empty)
    slow = SlowPRISM(7, 0.4, 30, window, similarity, count_empty)
    dropped = 0
    for part in torch.arange(len(x)).split(12):
        ctx = context(x[part], label[part], part)
        selection = filter.select(ctx)
        filter.update(ctx, selection)
        scores, keep = slow.step(x[part], label[part])
        want = torch.tensor(scores, dtype=torch.float64)
        assert selection.score.dtype is torch.float32
        # float32 centres are all of the vMF error: tight classes amplify it by their kappa
        atol = 1e-6 if similarity == "avg" else 5e-4
        assert torch.allclose(selection.score.double(), want, rtol=2e-6, atol=atol, equal_nan=True)
        assert selection.keep.tolist() == keep
        dropped += len(keep) - sum(keep)
    assert dropped > 30  # the loop did filter
    assert filter.count == len(slow.memory) == 30


def test_centre_score_is_the_mean_cosine_to_the_rows_of_the_class():
    x, label, _ = clusters(3, 40, 16, seed=0, rate=0.0)
    filter = PRISM(3, 16)
    remember(filter, x, label)
    for k in range(3):
        assert torch.allclose(filter.centers[k], x[label == k].mean(0), atol=1e-7)
    probe = normalize(torch.randn(5, 16))
    mean_cos = torch.stack([(probe @ x[label == k].T).mean(1) for k in range(3)], 1)
    want = mean_cos.log_softmax(1)[:, 1]
    assert torch.allclose(filter.score(context(probe, [1] * 5)), want, atol=1e-6)


def test_two_orthogonal_centres():
    eye = torch.eye(3)
    probe = context(eye[[0, 0]], [0, 1])
    for count_empty, want in ((False, [0.731059, 0.268941]), (True, [0.576117, 0.211942])):
        filter = PRISM(3, 3, count_empty_classes=count_empty)
        remember(filter, eye[:2], [0, 1])
        assert filter.score(probe).exp().tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("batch", "rate"), [(16, 0.25), (64, 0.5), (100, 0.29), (7, 0.5), (3, 0.9)])
@pytest.mark.parametrize("similarity", ["avg", "vmf"])
def test_window_of_one_drops_exactly_the_quantile(batch, rate, similarity):
    x, label, _ = clusters(4, 40 + 10 * batch, 8, seed=1, rate=rate)
    filter = PRISM(4, 8, rate, window=1, similarity=similarity)
    remember(filter, x[:40], label[:40])
    for part in torch.arange(40, len(x)).split(batch):
        ctx = context(x[part], label[part], part)
        selection = filter.select(ctx)
        filter.update(ctx, selection)
        assert int((~selection.keep).sum()) == int(rate * batch)
        dropped = selection.score[~selection.keep]
        assert dropped.max() < selection.score[selection.keep].min()
        assert selection.threshold == dropped.max()


def test_threshold_is_the_mean_probability_over_the_window():
    x, label, _ = clusters(4, 400, 8, seed=2, rate=0.3)
    filter = PRISM(4, 8, 0.25, window=3)
    remember(filter, x[:80], label[:80])
    seen = []
    for part in torch.arange(80, 400).split(16):
        selection = filter.select(context(x[part], label[part], part))
        seen.append(selection.score.exp().sort().values[3].item())
        assert selection.threshold.exp().item() == pytest.approx(sum(seen[-3:]) / len(seen[-3:]), rel=1e-5)
        assert torch.equal(selection.keep, selection.score > selection.threshold)
    assert filter.window_values.exp().tolist() == pytest.approx(seen[-3:], rel=1e-5)
    kept = [int(filter.select(context(x[p], label[p], p)).keep.sum()) for p in torch.arange(400).split(16)]
    assert len(set(kept)) > 1  # with a window the number varies


@pytest.mark.parametrize(
    ("window", "want"),
    [([-800.0, -4.0, -3.0, -2.0, -1e-9], -3.0), ([-800.0, -5.0, -3.0, -1e-9], -4.0), ([-9.0, -3.0], -6.0)],
)
def test_vmf_window_takes_the_mean_of_the_middle_half_so_that_outliers_do_not_rule_it(window, want):
    filter = PRISM(2, 4, window=6, similarity="vmf")
    filter.window_values[-len(window) :] = torch.tensor(window, dtype=torch.float64).flip(0)
    assert _middle_mean(filter.window_values, torch.tensor(-1.0)) == want


def test_nothing_above_the_mean_falls_back_and_cuts_the_window():
    x, label, _ = clusters(4, 96, 8, seed=4, rate=0.3)
    filter = PRISM(4, 8, 0.25, window=6)
    remember(filter, x[:80], label[:80])
    filter.window_values[2:] = math.log(0.9)  # higher than any P_clean can be
    selection = filter.select(context(x[80:], label[80:]))
    assert selection.stats["fallback"]
    assert int((~selection.keep).sum()) == 4
    quantile = selection.score.sort().values[3]
    assert selection.threshold == quantile
    assert filter.window_values[:-1].isnan().all()
    assert filter.window_values[-1].float() == quantile


@pytest.mark.parametrize("similarity", ["avg", "vmf"])
def test_decisions_do_not_depend_on_the_order_of_the_batch(similarity):
    x, label, _ = clusters(5, 164, 8, seed=5, rate=0.4)
    x[150:] = x[100]  # exact ties
    label[150:] = label[100]
    for high in (False, True):  # the usual rule, and the fallback that must break ties
        results = []
        for order in (torch.arange(64), torch.randperm(64, generator=torch.Generator().manual_seed(0))):
            filter = PRISM(5, 8, 0.4, window=8, similarity=similarity)
            remember(filter, x[:100], label[:100])
            if high:
                filter.window_values[1:] = -1e-300
            part = order + 100
            selection = filter.select(context(x[part], label[part], part))
            assert bool(selection.stats["fallback"]) is high
            back = torch.empty(64).index_copy_(0, order, selection.weight)
            results.append((back, selection.threshold))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.allclose(results[0][1], results[1][1], rtol=1e-5)
        if high:
            assert int((results[0][0] == 0).sum()) == int(0.4 * 64)


def test_ties_in_the_fallback_are_broken_by_dataset_index():
    x, label, _ = clusters(5, 100, 8, seed=5, rate=0.4)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    filter = PRISM(5, 8, 0.4)
    remember(filter, x, label)
    selection = filter.select(context(x[:1].expand(64, -1), label[:1].expand(64), index))
    assert selection.stats["fallback"]  # nothing is strictly above the common value
    assert sorted(index[~selection.keep].tolist()) == list(range(25))


def test_the_first_calls_keep_everything_and_push_nothing():
    x, label, _ = clusters(4, 64, 8, seed=6, rate=0.3)
    filter = PRISM(4, 8, 0.25)
    selection = filter.select(context(x, label))
    assert selection.keep.all()
    assert selection.score.isnan().all()
    assert selection.stats["unknown"].all()
    assert selection.threshold.isnan()
    assert filter.window_values.isnan().all()
    # a single class with a centre: P_clean is exactly 1 and says nothing
    remember(filter, x[label == 0], label[label == 0])
    selection = filter.select(context(x, torch.zeros_like(label)))
    assert (selection.score == 0).all()
    assert selection.keep.all()
    assert filter.window_values.isnan().all()


def test_rows_of_a_class_without_a_centre_are_kept_and_do_not_count():
    x, label, _ = clusters(4, 80, 8, seed=7, rate=0.0)
    filter = PRISM(6, 8, 0.5, window=1)
    remember(filter, x[:40], label[:40])
    mixed = label[40:].clone()
    mixed[:20] = 5
    selection = filter.select(context(x[40:], mixed))
    assert selection.stats["unknown"].tolist() == [True] * 20 + [False] * 20
    assert selection.score[:20].isnan().all()
    assert selection.keep[:20].all()
    assert int(selection.keep[20:].sum()) == 10


@pytest.mark.parametrize(("rate", "batch"), [(0.0, 64), (0.01, 64), (0.5, 1)])
def test_quantile_of_nothing_keeps_everything(rate, batch):
    x, label, _ = clusters(4, 100, 8, seed=8, rate=0.3)
    filter = PRISM(4, 8, rate)
    remember(filter, x, label)
    filter.window_values[-1] = -0.01  # even with a threshold from earlier batches
    selection = filter.select(context(x[:batch], label[:batch]))
    assert selection.keep.all()
    assert selection.threshold.isnan()
    assert filter.window_values[:-1].isnan().all()


def test_empty_batch_is_harmless():
    filter = PRISM(4, 8)
    ctx = context(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    selection = filter.select(ctx)
    filter.update(ctx, selection)
    assert selection.weight.shape == (0,)
    assert filter.count == 0


def test_warmup_keeps_all_makes_centres_and_pushes_nothing():
    x, label, _ = clusters(4, 160, 8, seed=9, rate=0.3)
    filter = PRISM(4, 8, 0.25, window=1, warmup_steps=3)
    for step, part in enumerate(torch.arange(160).split(32)):
        ctx = context(x[part], label[part], part)
        selection = filter.select(ctx)
        assert int(selection.keep.sum()) == (32 if step < 3 else 24)
        assert bool(filter.window_values.isnan()) is (step < 3)
        filter.update(ctx, selection)
        assert filter.filled.all()
    assert filter.count == 3 * 32 + 2 * 24


@pytest.mark.parametrize("similarity", ["avg", "vmf"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_rows_are_dropped_and_poison_nothing(similarity, bad):
    x, label, _ = clusters(4, 96, 8, seed=10, rate=0.3)
    broken = x.clone()
    broken[80], broken[85, 3] = bad, bad
    decisions = []
    for rows, part in ((broken, torch.arange(80, 96)), (x, torch.tensor([*range(81, 85), *range(86, 96)]))):
        filter = PRISM(4, 8, 0.25, similarity=similarity)
        remember(filter, x[:80], label[:80])
        ctx = context(rows[part], label[part], part)
        selection = filter.select(ctx)
        filter.update(ctx, selection)
        decisions.append((selection, filter))
    (selection, filter), (reference, without) = decisions
    lost = torch.zeros(16, dtype=torch.bool)
    lost[[0, 5]] = True
    assert torch.equal(selection.stats["nonfinite"], lost)
    assert not selection.keep[lost].any()
    assert not selection.stats["unknown"].any()
    assert torch.equal(selection.weight[~lost], reference.weight)
    assert selection.threshold == reference.threshold
    assert filter.memory.isfinite().all()
    assert torch.equal(filter.centers, without.centers)
    remember(filter, broken[[80, 85]], label[[80, 85]])  # whatever the driver thinks of them
    assert torch.equal(filter.centers, without.centers)


@pytest.mark.parametrize("size", [10, 16, 40])
def test_ring_holds_the_newest_kept_rows_for_any_batch_size(size):
    g = torch.Generator().manual_seed(11)
    filter = PRISM(5, 3, memory_size=size)
    kept = deque(maxlen=size)
    for batch in (4, 1, 7, 16, 3, 50, 9, 8):
        x = normalize(torch.randn(batch, 3, generator=g))
        label = torch.randint(5, (batch,), generator=g)
        weight = (torch.rand(batch, generator=g) < 0.6).float()
        filter.update(context(x, label), Selection(weight, weight, weight.sum()))
        kept.extend((*row, float(y)) for row, y, w in zip(x.tolist(), label, weight, strict=True) if w)
        used = filter.memory_label >= 0
        got = torch.cat([filter.memory[used], filter.memory_label[used].float().unsqueeze(1)], 1)
        want = torch.tensor(list(kept))
        assert filter.count == used.sum() == len(kept)
        # oldest first, starting at the pointer once full
        if filter.count == size:
            got = got.roll(-int(filter.pointer), 0)
        assert torch.allclose(got, want, atol=1e-6)
        for k in range(5):
            rows = want[want[:, 3] == k, :3]
            assert bool(filter.filled[k]) is (len(rows) > 0)
            assert torch.allclose(filter.centers[k], rows.mean(0) if len(rows) else torch.zeros(3), atol=1e-6)


def test_a_class_whose_rows_were_all_evicted_has_no_centre():
    filter = PRISM(3, 4, memory_size=4)
    remember(filter, torch.eye(4), [0, 0, 1, 1])
    remember(filter, torch.eye(4)[:2], [2, 1])
    assert filter.filled.tolist() == [False, True, True]
    assert (filter.centers[0] == 0).all()
    assert filter.score(context(torch.eye(4)[:1], [0])).isnan().all()


def test_memory_never_holds_a_dropped_row():
    x, label, _ = clusters(4, 640, 8, seed=12, rate=0.4)
    filter = PRISM(4, 8, 0.4, memory_size=1000)
    dropped = []
    for part in torch.arange(640).split(32):
        ctx = context(x[part], label[part], part)
        selection = filter.select(ctx)
        filter.update(ctx, selection)
        dropped.append(part[~selection.keep])
    dropped = torch.cat(dropped)
    assert len(dropped) > 100
    assert filter.count == 640 - len(dropped)
    assert (torch.cdist(x[dropped], filter.memory[: filter.count]).amin(1) > 1e-3).all()


@pytest.mark.parametrize("decades", [0, 14])
def test_running_sums_equal_rebuilt_ones_after_thousands_of_steps(decades):
    g = torch.Generator().manual_seed(13)
    filter = PRISM(40, 8, memory_size=101)
    for _ in range(2000):
        x = torch.randn(8, 8, generator=g) * 10 ** (-decades * torch.rand(8, 8, generator=g))
        label = torch.randint(40, (8,), generator=g)
        weight = (torch.rand(8, generator=g) < 0.5).float()
        filter.update(context(x, label), Selection(weight, weight, weight.sum()))
    before = {k: v.clone() for k, v in filter.state_dict().items()}
    filter.rebuild()
    assert filter.steps == 2000
    for name in ("class_sum", "class_count", "centers", "filled"):
        assert torch.equal(getattr(filter, name), before[name]), name  # bit for bit: the sums are exact
    used = filter.memory_label == filter.memory_label[0]
    assert torch.allclose(
        filter.centers[filter.memory_label[0]].double(), filter.memory[used].double().mean(0), atol=1e-7
    )


@pytest.mark.parametrize("similarity", ["avg", "vmf"])
def test_a_restored_filter_continues_bit_for_bit(similarity):
    x, label, _ = clusters(6, 960, 8, seed=14, rate=0.4)

    def run(filter, parts):
        out = []
        for part in parts:
            ctx = context(x[part], label[part], part)
            selection = filter.select(ctx)
            filter.update(ctx, selection)
            out.append((selection.weight, selection.score, selection.threshold))
        return out

    def make():
        return PRISM(6, 8, 0.4, 200, 7, similarity, warmup_steps=2)

    parts = torch.arange(960).split(32)
    whole = make()
    want = run(whole, parts)
    first, second = make(), make()
    run(first, parts[:11])
    state = first.state_dict()
    assert all(v.data_ptr() == dict(first.named_buffers())[k].data_ptr() for k, v in state.items())
    second.load_state_dict({k: v.clone() for k, v in state.items()})
    got = run(second, parts[11:])
    for a, b in zip(want[11:], got, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]) or name == "window_values", name
    assert torch.equal(whole.window_values, second.window_values)


def test_state_is_written_in_place():
    x, label, _ = clusters(4, 64, 8, seed=15, rate=0.4)
    filter = PRISM(4, 8, memory_size=40)
    where = {k: (v.data_ptr(), v.shape) for k, v in filter.named_buffers()}
    for _ in range(3):
        ctx = context(x, label)
        filter.update(ctx, filter.select(ctx))
    filter.rebuild()
    assert where == {k: (v.data_ptr(), v.shape) for k, v in filter.named_buffers()}
    assert {"memory", "memory_label", "centers", "filled", "window_values"} <= set(where)


@pytest.mark.parametrize("similarity", ["avg", "vmf"])
def test_autocast_changes_nothing(similarity):
    x, label, _ = clusters(4, 128, 16, seed=16, rate=0.4)
    plain, auto = PRISM(4, 16, similarity=similarity), PRISM(4, 16, similarity=similarity)
    for part in torch.arange(128).split(32):
        ctx = context(x[part], label[part], part)
        want = plain.select(ctx)
        plain.update(ctx, want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = auto.select(ctx)
            auto.update(ctx, got)
        assert torch.equal(want.weight, got.weight)
        assert torch.allclose(want.score, got.score, rtol=0, atol=0, equal_nan=True)


def test_rows_need_not_be_unit_nor_detached_and_stay_untouched():
    x, label, _ = clusters(4, 64, 8, seed=17, rate=0.4)
    filter = PRISM(4, 8)
    remember(filter, x, label)
    want = filter.score(context(x, label))
    raw = (x * torch.logspace(-3, 3, 64).unsqueeze(1)).requires_grad_()
    before = raw.detach().clone()
    got = filter.score(context(raw, label))
    filter.update(context(raw, label), Selection.keep_all(label))
    assert torch.allclose(got, want, atol=1e-6)
    assert not got.requires_grad
    assert torch.equal(raw.detach(), before)


def vmf_filter(dim, kappas):
    """Two orthogonal class directions with given concentrations."""
    filter = PRISM(len(kappas), dim, similarity="vmf")
    for k, kappa in enumerate(kappas):
        low, high = 0.0, filter.max_rbar
        for _ in range(100):
            middle = (low + high) / 2
            too_low = concentration(torch.tensor(middle).double(), dim) < kappa
            low, high = (middle, high) if too_low else (low, middle)
        filter.centers[k, k] = low
    filter.filled.fill_(True)
    return filter


def test_vmf_with_equal_concentrations_is_a_softmax_of_scaled_cosines():
    filter = vmf_filter(4, [9.0, 9.0, 9.0])
    probe = normalize(torch.randn(10, 4))
    want = (9 * probe[:, :3]).log_softmax(1)[:, 2]
    assert torch.allclose(filter.score(context(probe, [2] * 10)), want, atol=1e-5)


@pytest.mark.parametrize(("cos", "want"), [(0.8, 0.4977), (0.3, 0.0178)])
def test_vmf_tight_class_punishes_outliers_more(cos, want):
    # both classes in one direction, concentrations 10 and 2
    filter = vmf_filter(3, [10.0, 2.0])
    filter.centers[1] = filter.centers[1, [1, 0, 2]]
    probe = torch.tensor([[cos, math.sqrt(1 - cos**2), 0.0]])
    assert filter.score(context(probe, [0])).exp().item() == pytest.approx(want, abs=1e-4)


def test_shared_kappa_is_the_row_weighted_mean_and_makes_few_shot_classes_fair():
    x, label, _ = clusters(3, 60, 16, seed=23, rate=0.0, spread=0.7)
    filter = PRISM(5, 16, similarity="vmf", shared_kappa=True)
    remember(filter, x, label)
    remember(filter, x[:1], [3])  # a single row: kappa would be clamped at hundreds
    rbar = filter.centers.double().norm(dim=1)
    rows = torch.bincount(filter.memory_label[:61], minlength=5)
    kappa = concentration(((rows * rbar**2).sum() / 61).sqrt(), 16)
    want = (kappa * x.double() @ normalize(filter.centers.double())[:4].T).log_softmax(1)[:, 3]
    assert torch.allclose(filter.score(context(x, [3] * 60)).double(), want, atol=1e-5)
    assert PRISM(5, 16, similarity="vmf", shared_kappa=True).suggest(context(x[:2], [0, 0])).tolist() == [
        -1,
        -1,
    ]


def test_vmf_single_rows_and_duplicates_stay_finite():
    x, label, _ = clusters(4, 60, 64, seed=18, rate=0.0)
    filter = PRISM(6, 64, similarity="vmf")
    remember(filter, x, label)
    remember(filter, x[:1], [4])  # one row
    remember(filter, x[1:2].expand(9, -1), [5] * 9)  # duplicates: rbar -> 1
    for k in range(6):
        score = filter.score(context(x, [k] * 60))
        assert score.isfinite().all()
        assert (score <= 0).all()


def test_vmf_does_not_saturate_in_high_dimensions():
    x, label, wrong = clusters(98, 98 * 60, 512, seed=19, rate=0.5, spread=1.0)
    filter = PRISM(98, 512, similarity="vmf", memory_size=len(x))
    remember(filter, x[~wrong], label[~wrong])
    rbar = filter.centers.double().norm(dim=1)
    kappa = concentration(rbar, 512)
    assert 200 < kappa.mean() < 1000
    score = filter.score(context(x, label))
    assert score.isfinite().all()
    assert auroc(score, wrong) > 0.999
    # what the plain posterior would have lost: most clean rows have P_clean = 1 in float32
    assert (score.exp()[~wrong] == 1).float().mean() > 0.9
    # no two wrong rows tie; counted in the float64 in which decisions are made, as float32 by itself makes a
    # few pairs of so many values within 300 nats equal
    ctx = context(x, label)
    rows = filter.unit_rows(ctx.embedding, ctx.label)[0]
    exact = filter._log_prob(filter._class_scores(rows), ctx.label)
    assert torch.equal(exact.float(), score)
    assert len(exact[wrong].unique()) == int(wrong.sum())
    # a noise rate far too high puts the threshold among rows that only float64 can tell apart
    too_high = PRISM(98, 512, 0.7, window=1, similarity="vmf")
    for name in ("centers", "filled"):
        getattr(too_high, name).copy_(getattr(filter, name))
    selection = too_high.select(context(x[:400], label[:400]))
    assert int((~selection.keep).sum()) == 280


def test_shared_kappa_rescues_vmf_where_half_of_the_labels_are_wrong():
    x, label, wrong = clusters(60, 2400, 128, seed=24, rate=0.5)
    order = torch.cat([torch.randperm(2400, generator=torch.Generator().manual_seed(e)) for e in range(2)])
    result = {}
    for shared in (False, True):
        filter = PRISM(60, 128, 0.5, memory_size=2400, similarity="vmf", shared_kappa=shared)
        for part in order.split(64):
            ctx = context(x[part], label[part], part)
            filter.update(ctx, filter.select(ctx))
        result[shared] = auroc(filter.score(context(x, label)).nan_to_num(nan=0.0), wrong)
    assert result[True] > 0.95 > result[False] + 0.1


@pytest.mark.parametrize("similarity", ["avg", "vmf"])
@pytest.mark.parametrize("rate", [0.25, 0.45])
def test_kept_samples_become_cleaner_than_the_labels(similarity, rate):
    x, label, wrong = clusters(10, 6400, 32, seed=20, rate=rate)
    filter = PRISM(10, 32, rate, memory_size=2000, similarity=similarity)
    precision, recall, start = [], [], []
    for step, part in enumerate(torch.arange(6400).split(64)):
        ctx = context(x[part], label[part], part)
        selection = filter.select(ctx)
        filter.update(ctx, selection)
        keep, clean = selection.keep, ~wrong[part]
        if 5 <= step < 15:
            start.append((keep & clean).sum() / keep.sum())
        if step >= 50:
            precision.append((keep & clean).sum() / keep.sum())
            recall.append((keep & clean).sum() / clean.sum())
    assert torch.stack(start).mean() > 1 - rate + 0.05
    assert torch.stack(precision).mean() > 0.95
    assert torch.stack(recall).mean() > 0.9


def test_whole_set_rule_drops_the_lowest_of_those_with_an_opinion():
    filter = PRISM(4, 8, 0.5)
    nan = math.nan
    selection = filter.select_scores(torch.tensor([-5.0, nan, -1.0, -7.0, nan, -2.0, -3.0]))
    assert selection.weight.tolist() == [0, 1, 1, 0, 1, 1, 1]
    assert selection.threshold == -5
    assert selection.stats["unknown"].tolist() == [False, True, False, False, True, False, False]
    assert filter.window_values.isnan().all()
    # ties by position; certainty is never dropped; nothing to drop
    assert filter.select_scores(torch.full((4,), -1.0)).weight.tolist() == [0, 0, 1, 1]
    assert filter.select_scores(torch.tensor([0.0, -1.0, 0.0, 0.0])).weight.tolist() == [1, 0, 1, 1]
    assert filter.select_scores(torch.tensor([nan, -1.0])).keep.all()
    assert filter.granularities == ("batch", "epoch")


def test_whole_set_scores_do_not_depend_on_chunks():
    x, label, wrong = clusters(10, 1000, 32, seed=21, rate=0.3)
    filter = PRISM(10, 32, 0.3)
    remember(filter, x, label)
    whole = filter.score(context(x, label))
    parts = [filter.score(context(x[p], label[p])) for p in torch.arange(1000).split(77)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    selection = filter.select_scores(whole)
    assert int((~selection.keep).sum()) == 300
    assert (~wrong[selection.keep]).float().mean() > 0.9


@pytest.mark.parametrize("similarity", ["avg", "vmf"])
def test_suggestion_is_the_most_probable_class_with_a_centre(similarity):
    filter = PRISM(5, 4, similarity=similarity)
    probe = context(torch.cat([torch.eye(4)[:3], torch.full((1, 4), math.nan)]), [0, 0, 0, 0])
    assert filter.suggest(probe).tolist() == [-1] * 4
    remember(filter, torch.eye(4)[[1, 2, 0]] + 0.1, [1, 2, 4])
    assert filter.suggest(probe).tolist() == [4, 1, 2, -1]


@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("similarity", ["avg", "vmf"])
def test_select_suggests_what_suggest_says_before_the_batch_is_remembered(similarity, count_empty):
    x, label, wrong = clusters(7, 400, 16, seed=25, rate=0.3, spread=0.5)
    clean = torch.where(wrong, -1, label)
    filter = PRISM(12, 16, 0.3, similarity=similarity, count_empty_classes=count_empty)
    empty = filter.select(context(x[:5], label[:5])).stats["suggested"]
    assert empty.dtype is torch.int64
    assert empty.tolist() == [-1] * 5
    remember(filter, x[:200][~wrong[:200]], label[:200][~wrong[:200]])
    x[210] = math.nan
    x[211] = -filter.centers.sum(0)  # every cosine may be negative: an empty class (0) must not win
    ctx = context(x[200:], label[200:])
    want = filter.suggest(ctx)
    got = filter.select(ctx).stats["suggested"]
    assert torch.equal(got, want)
    assert got[10] == -1
    assert filter.filled[got[got >= 0]].all()
    sure = (clean[200:] >= 0) & (got >= 0)
    sure[11] = False
    assert (got == clean[200:])[sure].float().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 5, 11_316])
def test_best_class_is_the_first_of_the_highest_scores(columns, dtype):
    scores = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    scores[torch.arange(20), torch.linspace(0, columns - 1, 20).long()] = 9.0  # both ends, too
    assert torch.equal(_argmax(scores), scores.argmax(dim=1))
    scores[:] = 1.0  # ties
    assert torch.equal(_argmax(scores), torch.zeros(40, dtype=torch.int64))
    assert _argmax(scores[:0]).shape == (0,)


def test_update_after_select_equals_update_alone_and_lets_the_batch_go():
    x, label, _ = clusters(4, 96, 8, seed=26, rate=0.3)
    one, other = PRISM(4, 8, memory_size=50), PRISM(4, 8, memory_size=50)
    for part in torch.arange(96).split(32):
        ctx = context(3 * x[part], label[part], part)
        selection = one.select(ctx)
        one.update(ctx, selection)
        assert not one._last
        other.update(ctx, selection)
    one.select(context(x[:32], label[:32]))
    for filter in (one, other):  # a batch other than the one that was selected
        remember(filter, x[40:50], label[40:50])
    for name in ("memory", "memory_label", "class_sum", "centers", "pointer", "steps"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_scores_are_products_in_full_precision(monkeypatch):
    filter = PRISM(4, 8, similarity="vmf")
    seen, given = [], torch.Tensor.__matmul__

    def spy(a, b):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return given(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    torch.set_float32_matmul_precision("medium")
    try:
        filter.score(context(torch.randn(3, 8), [0, 1, 2]))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"noise_rate": 1.0}, "noise_rate must lie in"),
        ({"noise_rate": -0.1}, "noise_rate must lie in"),
        ({"window": 0}, "window must be at least 1"),
        ({"memory_size": 0}, "memory_size must be at least 1"),
        ({"memory_size": 2**30}, "memory_size must be at most"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"shared_kappa": True}, "shared_kappa=True needs similarity='vmf'"),
        ({"similarity": "cos"}, "similarity must be 'avg', 'vmf' or 'proxy', got 'cos'"),
    ],
)
def test_arguments_outside_their_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PRISM(4, 8, **kwargs)


def test_inputs_that_do_not_fit():
    filter = PRISM(4, 8)
    with pytest.raises(ValueError, match=r"embeddings \(B, 8\).*Set embedding_dim"):
        filter.score(context(torch.zeros(2, 9), [0, 1]))
    with pytest.raises(ValueError, match=r"label 4 is outside 0\.\.3"):
        filter.score(context(torch.zeros(2, 8), [0, 4]))
    with pytest.raises(ValueError, match=r"label -1 is outside"):
        filter.update(context(torch.zeros(2, 8), [-1, 0]), Selection.keep_all(torch.zeros(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", ["avg", "vmf"])
def test_on_a_gpu_as_on_the_cpu_and_without_waiting(similarity):
    x, label, _ = clusters(8, 640, 32, seed=22, rate=0.4)
    cpu = PRISM(8, 32, 0.4, 300, similarity=similarity)
    gpu = PRISM(8, 32, 0.4, 300, similarity=similarity).cuda()
    for part in torch.arange(640).split(64):
        want = cpu.select(context(x[part], label[part], part))
        cpu.update(context(x[part], label[part], part), want)
        ctx = FilterContext(x[part].cuda(), label[part].cuda(), part.cuda())
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = gpu.select(ctx)
            gpu.update(ctx, got)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got.weight.cpu(), want.weight)


# ---- ProxySim ------------------------------------------------------------------------------------------


def proxy_context(embedding, label, proxies):
    return replace(context(embedding, label), proxies=proxies)


def test_proxy_similarity_is_the_average_one_with_unit_proxies_as_centres():
    x, label, _ = clusters(5, 128, 8, seed=21, rate=0.4)
    proxies = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 7
    part = PRISM(5, 8, 0.4, window=3, similarity="proxy")
    other = PRISM(5, 8, 0.4, window=3)
    assert part.requires == ("proxies",)
    assert other.requires == ()
    for rows in torch.arange(128).split(32):
        other.centers.copy_(normalize(proxies, dim=1))
        other.filled.fill_(True)
        want = other.select(context(x[rows], label[rows]))
        ctx = proxy_context(x[rows], label[rows], proxies)
        got = part.select(ctx)
        part.update(ctx, got)
        assert torch.equal(got.weight, want.weight)
        assert torch.equal(got.score, want.score)
        assert torch.equal(got.threshold, want.threshold)
        assert torch.equal(got.stats["suggested"], want.stats["suggested"])
    assert part.count == 0  # no memory
    assert part.steps == 4
    # whole-set scores: the proxies of the last step
    assert torch.equal(part.score(context(x, label)), part.score(proxy_context(x, label, proxies)))


def test_two_orthogonal_proxies():
    part = PRISM(2, 3, similarity="proxy")
    score = part.score(proxy_context(torch.eye(3)[[0, 0]], [0, 1], 5 * torch.eye(3)[:2]))
    assert score.exp().tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert part.memory.shape == (1, 3)


def test_before_any_proxy_was_seen_there_is_no_opinion_and_a_broken_one_is_no_class():
    part = PRISM(2, 3, similarity="proxy")
    assert part.score(context(torch.eye(3), [0, 1, 0])).isnan().all()
    broken = torch.eye(3)[:2].clone()
    broken[1] = torch.nan
    selection = part.select(proxy_context(torch.eye(3), [0, 1, 0], broken))
    assert selection.stats["unknown"].tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"needs proxies \(2, 3\), one per class, got \(4, 3\)"):
        part.select(proxy_context(torch.eye(3), [0, 1, 0], torch.ones(4, 3)))


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is not one: code for devices runs, with values to compare."""

    is_cpu = property(lambda self: False)


@pytest.mark.parametrize("similarity", ["avg", "vmf"])
@pytest.mark.parametrize("count_empty", [False, True])
def test_what_a_gpu_runs_decides_and_remembers_as_the_cpu_does(similarity, count_empty):
    """From no centres to a ring gone round, with unknown classes, broken rows and the fallback."""
    x, label, _ = clusters(6, 700, 8, seed=30, rate=0.4)
    x[::37] = math.nan
    options = {"similarity": similarity, "count_empty_classes": count_empty, "warmup_steps": 2}
    host, device = (PRISM(6, 8, 0.4, memory_size=90, window=4, **options) for _ in range(2))
    for name, value in device._buffers.items():
        device._buffers[name] = value.as_subclass(OnDevice)
    seen = set()
    for step, part in enumerate(torch.arange(700).split(35)):
        if step < 4:  # classes 4 and 5 come later
            part = part[label[part] < 4]
        if step == 15:
            for filter in (host, device):
                filter.window_values[1:] = -1e-300
        ctx = context(x[part], label[part], part)
        other = FilterContext(*(t.as_subclass(OnDevice) for t in (ctx.embedding, ctx.label, ctx.index)))
        want, got = host.select(ctx), device.select(other)
        host.update(ctx, want)
        device.update(other, got)
        assert isinstance(got.weight, OnDevice)
        assert torch.equal(got.weight, want.weight)
        torch.testing.assert_close(got.score.as_subclass(torch.Tensor), want.score, equal_nan=True)
        torch.testing.assert_close(got.threshold.as_subclass(torch.Tensor), want.threshold, equal_nan=True)
        for name in ("unknown", "nonfinite", "suggested", "fallback"):
            assert torch.equal(got.stats[name], want.stats[name]), name
            seen |= {name} if want.stats[name].any() else set()
    assert seen == {"unknown", "nonfinite", "suggested", "fallback"}
    for name, value in host.state_dict().items():
        torch.testing.assert_close(
            device.state_dict()[name].as_subclass(torch.Tensor), value, rtol=1e-12, atol=0, equal_nan=True
        )
