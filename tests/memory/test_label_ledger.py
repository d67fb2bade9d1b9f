"""LabelLedger against a Python loop over samples and labels."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nrml.memory import LabelLedger, SampleLedger

N, L = 6, 3


def batches(num=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(num):
        index = torch.randint(0, N - 1, (9,), generator=g)  # repeats; the last sample is never drawn
        weight = torch.randint(0, 4, (9, L), generator=g) / 4  # of which a half is trusted
        weight[torch.rand(9, L, generator=g) < 0.1] = math.nan
        score = -torch.rand(9, L, generator=g)
        score[torch.rand(9, L, generator=g) < 0.4] = math.nan
        yield index, weight, score


def test_equals_a_loop_over_samples_and_labels():
    ledger = LabelLedger(N, L)
    seen, dropped = [0] * N, [[0] * L for _ in range(N)]
    scores = [[[] for _ in range(L)] for _ in range(N)]
    for index, weight, score in batches():
        ledger.record(index, weight, score)
        for row, i in enumerate(index.tolist()):
            seen[i] += 1
            for c in range(L):
                w, s = float(weight[row, c]), float(score[row, c])
                dropped[i][c] += not w >= 0.5
                if not math.isnan(s):
                    scores[i][c].append(s)
    assert ledger.seen.tolist() == seen
    assert ledger.label_dropped.tolist() == dropped
    assert ledger.label_score_count.tolist() == [[len(s) for s in row] for row in scores]
    mean = torch.tensor([[sum(s) / len(s) if s else math.nan for s in row] for row in scores])
    torch.testing.assert_close(ledger.label_mean_score(), mean, equal_nan=True)
    last = torch.tensor([[s[-1] if s else math.nan for s in row] for row in scores])
    assert torch.equal(ledger.label_last_score.nan_to_num(9), last.half().nan_to_num(9))
    wanted = [[2 * d > n for d in row] for row, n in zip(dropped, seen, strict=True)]
    assert ledger.doubted().tolist() == wanted
    assert any(map(any, wanted))
    assert not ledger.doubted()[-1].any()


def test_the_record_of_a_sample_is_that_of_the_sample_ledger():
    one, two = LabelLedger(N, L), SampleLedger(N)
    for index, weight, score in batches(seed=1):
        one.record(index, weight, score)
        two.record(index, (weight >= 0.5).float(), score)
    for name, value in two.state_dict().items():
        assert torch.equal(value.nan_to_num(9), one.state_dict()[name].nan_to_num(9)), name


def test_impossible_labels_stay_finite_and_lowest():
    ledger = LabelLedger(2, 2)
    score = torch.tensor([[-math.inf, -1.0], [-5.0, -1e6]])
    ledger.record(torch.arange(2), torch.ones(2, 2), score)
    assert ledger.label_mean_score().isfinite().all()
    assert ledger.label_last_score[0, 0] == ledger.label_last_score[1, 1] == -65504
    assert ledger.label_last_score[1, 0] == -5
    ledger.record(torch.arange(2), torch.ones(2, 2), score)
    assert ledger.label_mean_score()[0, 0] == -65504, "also after several visits"


def test_size_is_what_is_promised():
    ledger = LabelLedger(1000, 19)
    labels = [b for name, b in ledger.named_buffers() if name.startswith("label_")]
    samples = [b for name, b in ledger.named_buffers() if not name.startswith("label_")]
    assert sum(b.numel() * b.element_size() for b in labels) == 10 * 19 * 1000
    assert sum(b.numel() * b.element_size() for b in samples) <= 41 * 1000


def test_state_round_trip_keeps_types_in_half_precision():
    ledger, other = LabelLedger(N, L), LabelLedger(N, L).bfloat16()
    for index, weight, score in batches():
        ledger.record(index, weight, score)
    other.load_state_dict(ledger.state_dict())
    for name, value in ledger.state_dict().items():
        assert value.dtype == other.state_dict()[name].dtype
        assert torch.equal(value.nan_to_num(9), other.state_dict()[name].nan_to_num(9)), name
    ledger.record(torch.zeros(0).long(), torch.zeros(0, L), torch.zeros(0, L))
    assert torch.equal(ledger.label_dropped, other.label_dropped)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="'num_labels'"):
        LabelLedger(3, 0)
    with pytest.raises(ValueError, match=r"'weight' must have shape \(2, 3\), got \(2,\)"):
        LabelLedger(N, L).record(torch.arange(2), torch.ones(2), torch.zeros(2, L))
    with pytest.raises(IndexError, match="6 samples, but got dataset index 6"):
        LabelLedger(N, L).record(torch.tensor([6]), torch.ones(1, L), torch.zeros(1, L))
