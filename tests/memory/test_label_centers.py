"""LabelCenters against a memory rebuilt by a Python loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from lightning_nrml.memory.label_centers import LabelCenters

L, D = 3, 5


def batches(num=12, rows=7, samples=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(num):
        index = torch.randint(0, samples, (rows,), generator=g)
        z = normalize(torch.randn(rows, D, generator=g), dim=1)
        label = (torch.rand(rows, L, generator=g) < 0.4).long()
        yield index, z, label, torch.rand(rows, L, generator=g) < 0.7


@pytest.mark.parametrize("size", [20, 6])  # a slot for every sample, and shared ones
def test_means_equal_a_loop_over_what_is_remembered(size):
    part, held = LabelCenters(L, D, size), {}
    for index, z, label, keep in batches():
        part.remember(index, z, label, keep)
        for i, row, y, k in zip(index.tolist(), z, label, keep, strict=True):
            held[i % size] = (i, row.double(), y, k)  # the last one of a slot stays
    held = {slot: entry for slot, entry in held.items() if entry[3].any()}
    query = normalize(torch.randn(6, D, generator=torch.Generator().manual_seed(9)), dim=1)
    who = torch.tensor([0, 1, 5, 7, 19, 13])
    found = part.means(query, who)
    alone = 0
    for row in range(6):
        for c in range(L):
            for kind in (0, 1):
                others = [
                    float(v @ query[row].double())
                    for i, v, y, k in held.values()
                    if i != int(who[row]) and k[c] and int(y[c]) == kind
                ]
                if others:
                    assert float(found[kind, row, c]) == pytest.approx(sum(others) / len(others), abs=1e-7)
                else:
                    alone += 1
                    assert math.isnan(float(found[kind, row, c]))
    assert alone < 12
    assert len(held) > 3


def test_sums_never_drift_and_do_not_depend_on_the_order():
    one, two = LabelCenters(L, D, 20), LabelCenters(L, D, 20)
    for index, z, label, keep in batches(200):
        one.remember(index, z, label, keep)
        last = [max(i for i, x in enumerate(index.tolist()) if x == v) for v in index.unique().tolist()]
        order = torch.tensor(last)[torch.randperm(len(last))]
        two.remember(index[order], z[order], label[order], keep[order])
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    fresh = LabelCenters(L, D, 20)
    there = one.memory_index >= 0
    fresh.remember(
        one.memory_index[there], one.memory[there], one.trust[there].clamp_min(0), one.trust[there] != 0
    )
    assert torch.equal(fresh.total, one.total)
    assert torch.equal(fresh.count, one.count)


def test_a_row_without_a_trusted_label_leaves_its_slot_empty():
    part = LabelCenters(L, D, 4)
    z = normalize(torch.ones(1, D), dim=1)
    yes = torch.ones(1, L, dtype=torch.bool)
    part.remember(torch.tensor([2]), z, torch.ones(1, L).long(), yes)
    assert part.count.tolist() == [[0] * L, [1] * L]
    part.remember(torch.tensor([6]), z, torch.ones(1, L).long(), ~yes)  # shares the slot
    assert int(part.count.sum()) == 0
    assert not part.total.any()
    assert part.memory_index.tolist() == [-1] * 4
    part.remember(
        torch.zeros(0).long(), torch.zeros(0, D), torch.zeros(0, L).long(), torch.zeros(0, L).bool()
    )
    assert int(part.count.sum()) == 0


def test_bad_sizes():
    with pytest.raises(ValueError, match="'memory_size'"):
        LabelCenters(L, D, 0)
