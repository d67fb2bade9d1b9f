"""Distance-weighted sampling: the weights of the paper, a slow loop, and what is drawn how often."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from margin_rows import at_distances, batch, seeded
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import DistanceWeightedMiner, MarginLoss
from lightning_nrml.losses.margin import _draw

# ---- the weights of the negatives -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "want"),
    [
        (3, {0.5: 0.6931, 0.7: 0.3567, 1.4: -0.3365}),
        (128, {0.5: 91.3702, 1.0: 17.9801, 1.4: -0.3115}),
        (512, {0.5: 369.9301, 1.0: 73.2151, 1.4: -0.2347}),
    ],
)
def test_log_weights_of_the_paper(dim, want):
    z = at_distances(list(want), dim)
    share = DistanceWeightedMiner(0.5, 2.5).probability(z, torch.arange(4))[0, 1:]
    log_weight = torch.tensor(list(want.values()), dtype=torch.float64)
    torch.testing.assert_close(share, log_weight.softmax(0), rtol=2e-4, atol=0)


def test_below_the_cut_off_all_distances_count_alike_and_antipodes_are_finite():
    z = at_distances([0.1, 0.4, 0.8, 2.0], 8)
    share = DistanceWeightedMiner(0.8, 2.5).probability(z, torch.arange(5))
    torch.testing.assert_close(share[0, 1], share[0, 3])
    torch.testing.assert_close(share[0, 2], share[0, 3])
    assert share[0, 4].isfinite()
    # D' = 0.8, and 1 - D^2 / 4 stops at 1e-6 for the antipode
    log_ratio = -6 * math.log(2 / 0.8) - 2.5 * (math.log(1e-6) - math.log(1 - 0.16))
    assert float((share[0, 4] / share[0, 3]).log()) == pytest.approx(log_ratio, rel=1e-6)


def slow_probability(z: Tensor, label: Tensor, cutoff: float, far: float) -> Tensor:
    z = F.normalize(z.double(), dim=1)
    dim, out = z.shape[1], torch.zeros(len(z), len(z), dtype=torch.float64)
    for i in range(len(z)):
        log_weight: dict[int, float] = {}
        for j in range(len(z)):
            d = max(float((z[i] - z[j]).norm()), cutoff)
            if label[i] != label[j] and d < far:
                log_weight[j] = (2 - dim) * math.log(d) - (dim - 3) / 2 * math.log(1 - d * d / 4)
        top = max(log_weight.values(), default=0.0)
        mass = sum(math.exp(v - top) for v in log_weight.values())
        for j, v in log_weight.items():
            out[i, j] = math.exp(v - top) / mass
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [2, 3, 40])
def test_probabilities_equal_the_loop(dtype, dim):
    z, label = batch(24, dim)
    z = z.to(dtype)
    got = DistanceWeightedMiner().probability(z, label)
    assert got.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), slow_probability(z, label, 0.5, 1.4), rtol=1e-4, atol=1e-6)


def clusters(flips: int, dim: int = 512) -> tuple[Tensor, Tensor]:
    """24 tight classes of 5 rows, of which some carry the label of the next class."""
    centre = F.normalize(torch.randn(24, dim, generator=seeded(2)), dim=1)
    label = torch.arange(120) // 5
    z = centre[label] + 0.1 / math.sqrt(dim) * torch.randn(120, dim, generator=seeded(3))
    wrong = torch.arange(flips) * 10
    label[wrong] = (label[wrong] + 1) % 24
    return z, label


@pytest.mark.parametrize("flips", [0, 1, 6, 12])
def test_wrong_labels_do_not_silence_other_anchors_in_high_dimension(flips):
    """A close "negative" has e^350 times the weight of the others: too much for one maximum for all."""
    z, label = clusters(flips)
    share = DistanceWeightedMiner().probability(z, label)
    distance = torch.cdist(F.normalize(z.double(), dim=1), F.normalize(z.double(), dim=1))
    torch.testing.assert_close(share.sum(dim=1), torch.ones(120))
    assert (share[label[:, None] == label[None, :]] == 0).all()
    assert (share[distance >= 1.4001] == 0).all()
    torch.testing.assert_close(share.double(), slow_probability(z, label, 0.5, 1.4), rtol=2e-3, atol=1e-6)
    touched = share[:, torch.arange(flips) * 10].sum(dim=1) > 0.5
    assert int(touched.sum()) <= 5 * flips  # only anchors of the flipped rows' clusters


def test_a_far_near_duplicate_changes_no_other_row():
    z, _ = batch(12, 256, 12)
    far = -5 * z[0] + 0.01 * torch.randn(2, 256, generator=seeded(1))
    before = DistanceWeightedMiner().probability(torch.cat([z, far[:1]]), torch.arange(13))
    after = DistanceWeightedMiner().probability(torch.cat([z, far]), torch.arange(14))
    assert torch.equal(before[0, :12], after[0, :12])
    assert float(after[12, 13]) == pytest.approx(1)


@pytest.mark.parametrize("dim", [3, 4, 6])
def test_distances_of_negatives_are_flat_for_uniform_points(dim):
    z = torch.randn(1500, dim, generator=seeded(4), dtype=torch.float64)
    share = DistanceWeightedMiner(0.02, 2.5).probability(z, torch.arange(1500))
    z = F.normalize(z, dim=1)
    distance = torch.cdist(z, z)
    bins = (distance * 10).long().clamp(max=19)  # of width 0.1 on [0, 2]
    mass = torch.zeros(20, dtype=torch.float64).index_add_(0, bins.flatten(), share.flatten()) / 1500
    low = 3 if dim == 3 else 5  # too few pairs are closer than that
    assert mass[low:].min() > 0.9 * mass[low:].mean()
    assert mass[low:].max() < 1.1 * mass[low:].mean()
    uniform = torch.histc(distance, 20, 0, 2)[low:]
    assert uniform.max() > 2 * uniform.min()  # which plain random negatives would give


# ---- the draw -------------------------------------------------------------------------------------------


def test_each_pair_of_a_class_gets_one_negative_of_another():
    _, label = batch(20)
    label[3] = 9  # a class of one row: a negative, no anchor
    a, p, n = DistanceWeightedMiner()(batch(20)[0], label, None, seeded(0))
    pairs = [(i, j) for i, j in itertools.permutations(range(20), 2) if label[i] == label[j]]
    assert list(zip(a.tolist(), p.tolist(), strict=True)) == pairs
    assert (label[n] != label[a]).all()
    assert a.dtype is n.dtype is torch.int64


@pytest.mark.parametrize("dim", [3, 24])
def test_negatives_are_drawn_by_their_probability(dim):
    z, label = batch(24, dim, 3)
    miner, generator = DistanceWeightedMiner(), seeded(1)
    count = torch.zeros(24, 24, dtype=torch.float64)
    for _ in range(600):
        a, _, n = miner(z, label, None, generator)
        count.index_put_((a, n), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    want = slow_probability(z, label, 0.5, 1.4)
    assert (count.sum(dim=1) == 600 * 7).all()
    assert (count[want == 0] == 0).all()
    spread = (want * (1 - want) * 4200).sqrt()
    off = (count - 4200 * want).abs() / spread.clamp(min=1)
    assert off.max() < 5
    chi = ((count - 4200 * want) ** 2 / (4200 * want).clamp(min=1e-9))[want * 4200 > 5]
    free = len(chi) - 24
    assert float(chi.sum()) == pytest.approx(free, abs=5 * math.sqrt(2 * free))


def test_the_negatives_of_one_anchor_are_drawn_independently():
    z, label = torch.eye(12)[:, :11] + 0.5, torch.tensor([0, 0, 0, *range(1, 10)])
    z[:3] = z[0]  # the same row three times: positives 1 and 2 of anchor 0 have the same chances
    agree = total = 0
    for seed in range(300):
        a, p, n = DistanceWeightedMiner()(z, label, None, seeded(seed))
        one, two = n[(a == 0) & (p == 1)], n[(a == 0) & (p == 2)]
        agree, total = agree + int(one == two), total + 1
    share = DistanceWeightedMiner().probability(z, label)[0]
    want = float((share**2).sum())
    assert agree / total == pytest.approx(want, abs=5 * math.sqrt(want * (1 - want) / total))


def test_draws_are_as_fine_in_true_half_precision():
    share = torch.full((1, 1000), 1e-3)
    want = _draw(share, 4000, seeded(0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = _draw(share, 4000, seeded(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert len(got.unique()) > 900


def test_columns_without_weight_are_never_drawn(monkeypatch):
    share = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [1e-30, 0, 0, 0, 0], [0, 0, 0, 0, 2.0]])
    for edge in (0.0, 0.299999, 0.3, 0.5, 1 - 2**-24, 1.0):
        monkeypatch.setattr(torch, "rand", lambda *size, edge=edge, **_: torch.full(size, edge))
        drawn = _draw(share, 4, None)
        assert (drawn[0] == (1 if edge < 0.3 else 3)).all()
        assert (drawn[1] == 0).all()
        assert (drawn[2] == 4).all()


def test_a_sum_that_grows_where_nothing_is_draws_the_row_before(monkeypatch):
    """As parallel sums on GPUs may, by rounding."""
    share = torch.tensor([[0.5, 0.0, 0.0, 0.5]])
    grown = torch.tensor([[0.5, 0.6, 0.7, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: grown)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor([[0.55, 0.65, 0.8]]))
    assert _draw(share, 3, None).tolist() == [[0, 0, 3]]


def test_an_anchor_without_a_near_negative_gets_any_of_another_class():
    z = torch.tensor([[1.0, 0], [1.0, 0.01], [-1.0, 0], [-1.0, 0.01], [-1.0, 0.02]])
    label = torch.tensor([0, 0, 1, 1, 2])
    miner = DistanceWeightedMiner()
    assert miner.probability(z, label)[0].sum() == 0
    found = [miner(z, label, None, seeded(s)) for s in range(40)]
    assert {int(n[0]) for _, _, n in found} == {2, 3, 4}
    assert {int(n[2]) for _, _, n in found} == {4}  # near: row 4 for anchor 2
    value = MarginLoss()(z, label, triplets=miner(z, label))
    assert value.isfinite()


def test_dropped_rows_are_not_mined_and_change_no_draw():
    z, label = batch()
    weight = torch.ones(20)
    weight[[0, 5, 9, 13]] = 0
    rows = weight.nonzero().squeeze(1)
    broken = z.clone()
    broken[[0, 5]] = torch.nan
    a, p, n = DistanceWeightedMiner()(broken, label, weight, seeded(3))
    for got, want in zip(
        (a, p, n), DistanceWeightedMiner()(z[rows], label[rows], None, seeded(3)), strict=True
    ):
        assert torch.equal(got, rows[want])


@pytest.mark.parametrize("label", [[0, 0, 0, 0], [0, 1, 2, 3], []])
def test_batches_without_triplets(label):
    label = torch.tensor(label, dtype=torch.int64)
    z = torch.randn(len(label), 3, requires_grad=True)
    assert [len(x) for x in DistanceWeightedMiner()(z, label)] == [0, 0, 0]
    loss = MarginLoss(nu=1.0)
    value = loss(z, label)
    value.backward()
    assert value.item() == 0
    assert (z.grad == 0).all()
    assert (loss.beta.grad == 0).all()
