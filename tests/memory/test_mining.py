"""InsCLR's mining: closed forms, a slow loop in float64 written from the rules, and odd inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.memory import CandidatePool, MiningConfig
from lightning_nrml.memory.mining import draw, group_labels, keep_neighbours, mine, random_negatives, traverse


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(*cosines: float) -> Tensor:
    """``(n, 2)`` unit rows with these cosines to (1, 0)."""
    return torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines], dtype=torch.float64)


# ---- in the batch ---------------------------------------------------------------------------------------


def test_neighbours_below_the_threshold_share_minus_the_label_of_their_anchor() -> None:
    features = torch.stack([at(1, 0.9, 0.61, 0.59), at(1, 0.2, 0.1, math.nan)])
    kept = keep_neighbours(features, MiningConfig(in_batch=0.6))
    assert kept.tolist() == [[True, True, False], [False, False, False]]
    assert group_labels(kept).tolist() == [[1, 1, 1, -1], [2, -2, -2, -2]]


def test_relative_threshold_and_always_keep() -> None:
    features = torch.stack([at(1, 0.4, 0.3, 0.1), at(1, math.nan, 0.5, 0.1)])
    kept = keep_neighbours(features, MiningConfig(in_batch=0.7, in_batch_relative=True))
    assert kept.tolist() == [[True, True, False], [False, True, False]]
    kept = keep_neighbours(features, MiningConfig(in_batch=0.99, always_keep=2))
    assert kept.tolist() == [[True, True, False]] * 2


def test_a_similarity_at_a_threshold_reaches_it() -> None:
    """1/2 and 3/4 are exact in binary."""
    assert keep_neighbours(at(1, 0.5)[None], MiningConfig(in_batch=0.5)).tolist() == [[True]]
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.75**0.5]])
    for how in ({"pick": 1}, {"pick": 0, "pick_score": 0.5}):
        assert walk(MiningConfig(hit=0.5, rounds=1, **how), other, one) == [0]
    bank = torch.cat([one, other, other, -one])
    near, close = torch.tensor([[[1, 2, 3]]]), torch.tensor([[[0.75, 0.5, 0.25]]])
    config = MiningConfig(positive=0.75, negative=0.5, hit=0.9, rounds=0)  # candidates exist, none is taken
    kept, every = torch.ones(1, 1, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    rows, label = mine(
        torch.tensor([[0]]), kept, one[None], near, close, bank, every, config, 9, True, generator()
    )
    assert dict(zip(rows.tolist(), label.tolist(), strict=True)) == {1: 1, 3: 2}  # 2 is a candidate: neither


def test_everything_similar_leaves_the_labels_of_the_base_stage() -> None:
    kept = keep_neighbours(at(1, 0.9, 0.8, 0.7).expand(3, 4, 2), MiningConfig())
    assert torch.equal(group_labels(kept), torch.arange(1, 4)[:, None].expand(3, 4))


# ---- drawing --------------------------------------------------------------------------------------------


def test_draw_is_without_replacement_spreads_evenly_and_takes_the_first_ones_first() -> None:
    allowed = torch.arange(50) % 2 == 0
    counts = torch.zeros(50)
    source = generator()
    for _ in range(2000):
        rows = draw(allowed, 5, source)
        assert len(set(rows.tolist())) == 5
        counts[rows] += 1
    assert not counts[~allowed].any()
    assert (counts[allowed] - 400).abs().max() < 5 * math.sqrt(400)
    first = torch.zeros(50, dtype=torch.bool)
    first[[4, 5, 8]] = True
    assert {4, 8} <= set(draw(allowed, 3, generator(), first).tolist())
    assert draw(allowed, 99, generator()).tolist() == list(range(0, 50, 2))
    assert draw(allowed, -3, generator()).tolist() == []
    assert draw(~allowed & allowed, 3, generator()).tolist() == []


def test_base_negatives_are_written_rows_but_no_image_of_the_batch_and_none_near_it() -> None:
    filled = torch.ones(20, dtype=torch.bool)
    filled[[3, 4]] = False
    rows = random_negatives(torch.tensor([0, 1]), torch.tensor([[5, 6], [7, -1]]), filled, 100, generator())
    assert rows.tolist() == [2, *range(8, 20)]
    assert filled[0]  # the bank's own record is left alone


# ---- traversal ------------------------------------------------------------------------------------------


def walk(config: MiningConfig, candidate: Tensor, query: Tensor) -> list[int]:
    taken = traverse(
        candidate[None], torch.ones(1, len(candidate)).bool(), query[None], torch.ones(1, len(query)).bool(),
        config,
    )  # fmt: skip
    return taken[0].nonzero().flatten().tolist()


def arc(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_what_was_taken_asks_along_and_rounds_only_add() -> None:
    """A chain of 20-degree steps with a hit from cos 25 degrees on: one link a round."""
    chain = arc(20, 40, 60, 80)
    for pick in (1, 3, 0):
        config = {"hit": math.cos(math.radians(25)), "pick": pick, "pick_score": 0.9}
        found = [walk(MiningConfig(rounds=r, **config), chain, arc(0)) for r in range(6)]
        assert found == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_candidate_without_a_hit_is_never_taken() -> None:
    assert walk(MiningConfig(hit=0.6, pick=5), arc(10, 89, 120), arc(0)) == [0]
    assert walk(MiningConfig(hit=0.99, pick=5), arc(30, 89), arc(0)) == []
    assert walk(MiningConfig(hit=-1.0, pick=1, rounds=1), arc(170), arc(0)) == [0]  # a negative score is one


def test_mean_of_hits_and_maximum_choose_differently() -> None:
    """Candidate 0 sees one query closely, another at 50 degrees; candidate 1 sees only one, at 25."""
    candidate, query = arc(0, 75), arc(-10, 50)
    one = {"rounds": 1, "pick": 1, "hit": 0.6}
    assert walk(MiningConfig(score="max", **one), candidate, query) == [0]
    assert walk(MiningConfig(score="avg", **one), candidate, query) == [1]


# ---- mining as a whole ----------------------------------------------------------------------------------


def slow_mine(
    index: Tensor, kept: Tensor, features: Tensor, neighbour: Tensor, similarity: Tensor, bank: Tensor,
    filled: Tensor, config: MiningConfig,
) -> tuple[dict[int, int], set[int], set[int]]:  # fmt: skip
    """Positives with labels, negatives of the pool, and what random rows must not be; set by set."""
    batch = {int(i) for i in index.flatten()}
    entries: list[list[tuple[int, float]]] = []
    for g in range(len(index)):
        entries.append([])
        for r in range(index.shape[1]):
            if kept[g, r]:
                pairs = zip(neighbour[g, r].tolist(), similarity[g, r].tolist(), strict=True)
                entries[g] += [(j, s) for j, s in pairs if j >= 0 and j not in batch and filled[j]]
    sure = [{j for j, s in e if s >= config.positive} for e in entries]
    every_sure = set().union(*sure)
    between = [{j for j, s in e if config.negative <= s < config.positive} - every_sure for e in entries]
    label: dict[int, int] = {}
    for g in range(len(index)):
        query = [features[g, r] for r in range(index.shape[1]) if kept[g, r]]
        if config.query == "b+i":
            query += [bank[j] for j in sorted(sure[g])]
        taken: list[int] = []
        for _ in range(config.rounds):
            score = {}
            for j in between[g] - set(taken):
                hits = [float(bank[j] @ q) for q in query if float(bank[j] @ q) >= config.hit]
                if hits:
                    score[j] = sum(hits) / len(hits) if config.score == "avg" else max(hits)
            if config.pick:
                new = sorted(score, key=lambda j: -score[j])[: config.pick]
            else:
                new = [j for j in score if score[j] >= config.pick_score]
            taken += new
            query += [bank[j] for j in new]
        for j in sure[g] | set(taken):
            label[j] = g + 1
    far = {j for e in entries for j, s in e if s < config.negative}
    return label, far - every_sure - set().union(*between) - set(label), every_sure.union(*between) | batch


def case(seed: int, groups: int = 4, rows: int = 3, num: int = 120, size: int = 25, dim: int = 6) -> Any:
    """A clustered bank, its true neighbour lists, and a batch of random groups that overlap."""
    source = generator(seed)
    centre = torch.randn(6, dim, generator=source, dtype=torch.float64)
    bank = centre[torch.arange(num) % 6] + 0.6 * torch.randn(num, dim, generator=source, dtype=torch.float64)
    bank = F.normalize(bank, dim=1)
    similarity, neighbour = (bank @ bank.T - 9 * torch.eye(num, dtype=bank.dtype)).topk(size, dim=1)
    index = torch.randint(0, num, (groups, rows), generator=source)
    index[1, 0] = index[0, 1]  # one image in two groups
    kept = torch.rand(groups, rows, generator=source) < 0.8
    kept[:, 0] = True
    near, close = neighbour[index].clone(), similarity[index].clone()
    near[0, 0, -4:], close[0, 0, -4:] = -1, -math.inf
    filled = torch.rand(num, generator=source) < 0.9
    jitter = torch.randn(groups, rows, dim, generator=source, dtype=torch.float64)
    return index, kept, F.normalize(bank[index] + 0.1 * jitter, dim=2), near, close, bank, filled


CONFIGS = {
    "b+i_k": {"positive": 0.8, "negative": 0.6, "hit": 0.6, "pick": 2, "rounds": 3},
    "b_k": {"positive": 0.85, "negative": 0.5, "hit": 0.7, "pick": 4, "rounds": 2, "query": "b"},
    "max": {"positive": 0.8, "negative": 0.5, "hit": 0.6, "pick": 3, "rounds": 2, "score": "max"},
    "t": {"positive": 0.85, "negative": 0.5, "hit": 0.5, "pick": 0, "pick_score": 0.72, "rounds": 3},
    "none": {"positive": 1.0, "negative": 1.0},
}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("seed", range(4))
def test_mined_sets_are_those_of_the_slow_loop(name: str, seed: int) -> None:
    config, given = MiningConfig(**CONFIGS[name]), case(seed)
    written = given[6].clone()
    rows, label = mine(*given, config, 90, True, generator())
    assert torch.equal(given[6], written)  # the bank's own record is left alone
    positive = label <= len(given[0])
    want, far, banned = slow_mine(*given, config)
    assert dict(zip(rows[positive].tolist(), label[positive].tolist(), strict=True)) == want
    if name != "none":
        assert len(want) > 5
    negative = rows[~positive].tolist()
    assert bool((label[~positive] == 5).all())
    assert len(set(rows.tolist())) == len(rows)
    assert far <= set(negative) or len(far) > 90 - len(want)
    assert not set(negative) & (banned | set(want))
    assert all(given[6][j] for j in negative)
    free = {j for j in range(120) if given[6][j]} - banned - set(want)
    assert len(negative) == min(len(free), max(90 - len(want), 0))
    only, label = mine(*given, config, 90, False, generator())
    assert torch.equal(only, rows[positive])


def test_images_of_the_batch_are_never_read_from_the_memory() -> None:
    """The fault of the published code: own stored features came back as negatives, with loss 1."""
    for seed in range(6):
        given = case(seed)
        rows, _ = mine(*given, MiningConfig(positive=0.5, negative=0.2), 10**6, True, generator())
        assert not set(rows.tolist()) & set(given[0].flatten().tolist())


def test_another_order_of_the_bank_gives_the_same_images() -> None:
    index, kept, features, near, close, bank, filled = case(3)
    config = MiningConfig(**CONFIGS["b+i_k"])
    order = torch.randperm(120, generator=generator(9))  # old position -> new position
    back = order.argsort()
    rows, label = mine(index, kept, features, near, close, bank, filled, config, 90, False, generator())
    moved = torch.where(near >= 0, order[near], -1)
    other, again = mine(
        order[index], kept, features, moved, close, bank[back], filled[back], config, 90, False, generator()
    )
    one = dict(zip(order[rows].tolist(), label.tolist(), strict=True))
    assert one == dict(zip(other.tolist(), again.tolist(), strict=True))


def test_nothing_known_gives_random_negatives_and_nan_gives_no_positive() -> None:
    index, kept, features, near, close, bank, filled = case(0)
    empty = torch.full_like(near, -1)
    rows, label = mine(
        index, kept, features, empty, torch.full_like(close, -math.inf), bank, filled, MiningConfig(), 30,
        True, generator(),
    )  # fmt: skip
    assert len(rows) == 30
    assert (label == 5).all()
    nowhere = torch.zeros_like(filled)
    assert (
        len(mine(index, kept, features, near, close, bank, nowhere, MiningConfig(), 30, True, generator())[0])
        == 0
    )
    config = MiningConfig(positive=1.0, negative=0.1, query="b")
    blind = torch.full_like(features, math.nan)
    assert len(mine(index, kept, features, near, close, bank, filled, config, 30, False, generator())[0]) > 0
    assert len(mine(index, kept, blind, near, close, bank, filled, config, 30, False, generator())[0]) == 0
    rows, label = mine(
        index, kept, features, near, torch.full_like(close, math.nan), bank, filled, config, 30, False,
        generator(),
    )  # fmt: skip
    assert len(rows) == 0


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"mining\.hit is a cosine and must lie in \[-1, 1\], got 1\.5"):
        MiningConfig(hit=1.5)
    with pytest.raises(ValueError, match=r"mining\.negative 0\.8 is above mining\.positive 0\.7"):
        MiningConfig(positive=0.7, negative=0.8)
    for name in ("rounds", "pick", "always_keep"):
        with pytest.raises(ValueError, match=rf"mining\.{name} is -1: it must be 0 or more"):
            MiningConfig(**{name: -1})
    with pytest.raises(ValueError, match=r"mining\.query must be one of \('b', 'b\+i'\), got 'i'"):
        MiningConfig(query="i")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mining\.score must be one of \('avg', 'max'\), got 'min'"):
        MiningConfig(score="min")  # type: ignore[arg-type]


# ---- pool -----------------------------------------------------------------------------------------------


def test_a_pool_is_replaced_as_a_whole_and_drops_what_is_not_finite() -> None:
    pool = CandidatePool(5, 3)
    assert pool.of(torch.tensor([0]))[0].tolist() == [[-1, -1, -1]]
    pool.fill(torch.tensor([0, 1]), torch.tensor([[1, 2, 3], [0, 2, 4]]), torch.rand(2, 3), 0)
    pool.fill(
        torch.tensor([4, 2]), torch.tensor([[2, 1], [4, -1]]), torch.tensor([[0.5, math.nan], [0.5, 0.1]]), 7
    )
    assert pool.neighbour.tolist() == [[-1] * 3, [-1] * 3, [4, -1, -1], [-1] * 3, [2, -1, -1]]
    near, similarity = pool.of(torch.tensor([[4, 2]]))
    assert near.dtype is torch.int64
    assert similarity.tolist() == [[[0.5, -math.inf, -math.inf]] * 2]
    assert pool.of(torch.tensor([0]))[1].tolist() == [[-math.inf] * 3]
    assert int(pool.epoch) == 7
    with pytest.raises(ValueError, match="CandidatePool holds 3 neighbours, got 4"):
        pool.fill(torch.tensor([0]), torch.zeros(1, 4, dtype=torch.int64), torch.rand(1, 4), 0)
    with pytest.raises(IndexError, match="has 5 samples, but got dataset index 5"):
        pool.fill(torch.tensor([5]), torch.zeros(1, 2, dtype=torch.int64), torch.rand(1, 2), 0)
    with pytest.raises(ValueError, match=r"must both be \(1, p\), got \(1, 2\) and \(1, 3\)"):
        pool.fill(torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int64), torch.rand(1, 3), 0)
