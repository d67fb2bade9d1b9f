"""Health of a representation against closed forms and slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_nrml.metrics import alignment, embedding_std, rankme, uniformity
from lightning_nrml.metrics import health as module


def rows(n=60, d=7, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equally_used_directions_is_their_number(rank):
    z = torch.eye(8, dtype=torch.float64)[:rank].repeat(5, 1)
    assert float(rankme(z)) == pytest.approx(rank, rel=1e-12)
    assert float(rankme(z.float() * 300)) == pytest.approx(rank, rel=1e-6)


def test_rankme_of_unequal_directions_is_the_exponential_of_the_entropy():
    # 4, 1 and 1 rows along three axes: singular values 2, 1, 1, shares 1/2, 1/4, 1/4, entropy 1.5 ln 2
    z = torch.eye(5)[[0, 0, 0, 0, 1, 2]]
    assert float(rankme(z)) == pytest.approx(2**1.5, rel=1e-6)


def test_rankme_does_not_turn_with_the_axes_and_stays_below_the_rank():
    z = rows()
    turn = torch.linalg.qr(rows(7, 7, 1))[0]
    assert float(rankme(z @ turn)) == pytest.approx(float(rankme(z)), rel=1e-10)
    assert 6 < float(rankme(z)) < 7
    low = rows(60, 3) @ rows(3, 7, 2)
    assert 2 < float(rankme(low)) <= 3


def test_collapse():
    z = torch.ones(50, 4)
    assert float(rankme(z)) == pytest.approx(1, abs=1e-6)
    assert float(embedding_std(z)) == pytest.approx(0, abs=1e-7)
    assert float(uniformity(z)) == pytest.approx(0, abs=1e-6)
    assert float(rankme(torch.zeros(5, 3))) == 0


def test_std_closed_forms():
    both_ways = torch.cat([torch.eye(4), -torch.eye(4)])  # each column: mean 0, mean square 1/4
    assert float(embedding_std(both_ways)) == pytest.approx(1 / math.sqrt(4), rel=1e-6)
    one_axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # columns: 1 and 0
    assert float(embedding_std(one_axis)) == pytest.approx(0.5)
    gaussian = rows(20000, 16)
    assert float(embedding_std(gaussian)) == pytest.approx(1 / 4, rel=0.02)


def test_alignment_closed_forms():
    x = rows()
    assert float(alignment(x, 3 * x)) == pytest.approx(0, abs=1e-14)  # lengths do not count
    assert float(alignment(x, -x)) == pytest.approx(4)
    axis = torch.eye(4)
    assert float(alignment(axis, axis.roll(1, 0))) == pytest.approx(2)
    assert float(alignment(axis, axis.roll(1, 0), alpha=1)) == pytest.approx(math.sqrt(2))
    half = torch.cat([axis[:2], -axis[2:]])
    assert float(alignment(axis, half)) == pytest.approx(2)  # mean of 0, 0, 4, 4


def test_uniformity_closed_forms():
    assert float(uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))) == pytest.approx(-8)
    assert float(uniformity(torch.eye(6))) == pytest.approx(-4, abs=1e-6)
    assert float(uniformity(torch.eye(6), t=0.5)) == pytest.approx(-1, abs=1e-6)
    # +-e1, +-e2: of six pairs two are opposite and four orthogonal
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    want = math.log((2 * math.exp(-8) + 4 * math.exp(-4)) / 6)
    assert float(uniformity(cross)) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("block", [1, 61, 150, 1 << 22])
def test_uniformity_equals_the_loop_over_pairs_in_any_blocks(monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    z = rows(31)
    unit = F.normalize(z, dim=1)
    pairs = [float((unit[i] - unit[j]).square().sum()) for i in range(31) for j in range(i)]
    want = math.log(sum(math.exp(-2 * d) for d in pairs) / len(pairs))
    assert float(uniformity(z)) == pytest.approx(want, abs=1e-12)
    assert float(uniformity(z.float())) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_input_is_computed_in_full(dtype):
    z = rows(40, 5, dtype=dtype)
    for function in (rankme, embedding_std, uniformity):
        assert float(function(z)) == pytest.approx(float(function(z.double())), rel=1e-5)
    assert float(alignment(z, z.roll(1, 0))) == pytest.approx(
        float(alignment(z.double(), z.double().roll(1, 0)))
    )


def test_bad_rows_are_named():
    bad = torch.ones(4, 3)
    bad[2, 1] = torch.nan
    for function in (rankme, embedding_std, uniformity):
        with pytest.raises(ValueError, match="first rows: 2"):
            function(bad)
        with pytest.raises(ValueError, match="no rows"):
            function(torch.empty(0, 3))
    with pytest.raises(ValueError, match="at least 2 rows"):
        uniformity(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"x is \(4, 3\) but y is \(3, 3\)"):
        alignment(torch.ones(4, 3), torch.ones(3, 3))
