"""SampleLedger against a Python loop."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nrml.memory import SampleLedger


def test_equals_a_loop_over_the_samples_with_repeats_and_missing_scores():
    generator = torch.Generator().manual_seed(0)
    n = 7
    ledger = SampleLedger(n)
    seen, dropped, scores = [0] * n, [0] * n, [[] for _ in range(n)]
    suggested = [-1] * n
    for _ in range(10):
        index = torch.randint(0, n - 1, (12,), generator=generator)  # the last sample is never drawn
        soft = torch.tensor([0, 0.25, 0.5, 1, math.nan])
        weight = soft[torch.randint(0, 5, (12,), generator=generator)]
        score = torch.randn(12, generator=generator)
        score[torch.rand(12, generator=generator) < 0.4] = math.nan
        proposal = torch.randint(-1, 4, (12,), generator=generator)
        ledger.record(index, weight, score, proposal)
        for i, w, s, p in zip(
            index.tolist(), weight.tolist(), score.tolist(), proposal.tolist(), strict=True
        ):
            seen[i] += 1
            dropped[i] += not w >= 0.5
            if not math.isnan(s):
                scores[i].append(s)
            if p >= 0:
                suggested[i] = p
    assert ledger.seen.tolist() == seen
    assert ledger.dropped.tolist() == dropped
    assert ledger.score_count.tolist() == [len(s) for s in scores]
    assert ledger.suggested.tolist() == suggested
    last = torch.tensor([s[-1] if s else math.nan for s in scores])
    mean = torch.tensor([sum(s) / len(s) if s else math.nan for s in scores])
    torch.testing.assert_close(ledger.last_score, last, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(ledger.mean_score(), mean, equal_nan=True)
    assert math.isnan(mean[-1])


def test_without_suggestion_the_old_one_stays():
    ledger = SampleLedger(2)
    one = torch.ones(1)
    ledger.record(torch.tensor([1]), one, one, torch.tensor([5]))
    ledger.record(torch.tensor([1]), one, one)
    assert ledger.suggested.tolist() == [-1, 5]
    ledger.record(torch.tensor([1]), one, one, torch.tensor([0]))
    assert ledger.suggested.tolist() == [-1, 0]  # 0 is a label


def test_impossible_labels_sort_below_everything():
    ledger = SampleLedger(2)
    ledger.record(torch.tensor([0, 1]), torch.ones(2), torch.tensor([-math.inf, -900.0]))
    assert ledger.mean_score().argsort().tolist() == [0, 1]


def test_multi_label_rows_count_as_dropped_only_without_any_label():
    ledger = SampleLedger(3)
    weight = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    score = torch.tensor([[-1.0, -3.0], [math.nan, math.nan], [math.nan, -2.0]])
    ledger.record(torch.arange(3), weight, score)
    assert ledger.dropped.tolist() == [0, 1, 0]
    assert ledger.score_count.tolist() == [1, 0, 1]
    assert ledger.last_score[[0, 2]].tolist() == [-2.0, -2.0]


def test_kept_unless_most_batches_or_the_whole_set_decision_dropped_it():
    ledger = SampleLedger(5)
    for dropped in ([1, 2, 3], [2, 3], [3]):
        ledger.record(
            torch.arange(1, 4),
            (~torch.isin(torch.arange(1, 4), torch.tensor(dropped))).float(),
            torch.zeros(3),
        )
    ledger.record(torch.tensor([1, 2]), torch.ones(2), torch.zeros(2))
    assert ledger.dropped.tolist() == [0, 1, 2, 3, 0]
    assert ledger.seen.tolist() == [0, 4, 4, 3, 0]
    ledger.keep[4] = False
    assert ledger.kept().tolist() == [True, True, True, False, False]  # half of the batches are not most


def test_a_correction_can_be_taken_back():
    ledger = SampleLedger(3)
    with pytest.raises(RuntimeError, match="allow_corrections"):
        ledger.correct(torch.tensor([0]), torch.tensor([1]))
    ledger.allow_corrections()
    ledger.correct(torch.tensor([0, 2]), torch.tensor([4, 0]))
    assert ledger.corrected.tolist() == [4, -1, 0]
    ledger.correct(torch.tensor([0, 2]), torch.tensor([-1, 1]))
    assert ledger.corrected.tolist() == [-1, -1, 1]


def test_columns_are_a_snapshot_of_every_sample():
    ledger = SampleLedger(3)
    columns = ledger.to_columns()
    assert list(columns) == ["index", "seen", "dropped", "last_score", "mean_score", "suggested", "keep"]
    assert {len(c) for c in columns.values()} == {3}
    ledger.record(torch.tensor([2]), torch.zeros(1), torch.zeros(1))
    ledger.keep[2] = False
    assert columns["seen"].tolist() == [0, 0, 0]
    assert columns["keep"].all()
    assert ledger.to_columns()["keep"].tolist() == [True, True, False]


def test_state_round_trip_and_fixed_shape():
    ledger, other = SampleLedger(4), SampleLedger(4)
    pointers = {k: v.data_ptr() for k, v in ledger.state_dict().items()}
    ledger.record(
        torch.tensor([0, 3]), torch.tensor([0.0, 1.0]), torch.tensor([-2.0, -1.0]), torch.tensor([1, 2])
    )
    assert {k: v.data_ptr() for k, v in ledger.state_dict().items()} == pointers
    other.load_state_dict(ledger.state_dict())
    for name, column in ledger.to_columns().items():
        torch.testing.assert_close(column, other.to_columns()[name], equal_nan=True)


def test_empty_batch_changes_nothing():
    ledger = SampleLedger(2)
    empty = torch.zeros(0)
    ledger.record(empty.long(), empty, empty, empty.long())
    assert ledger.seen.sum() == 0


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="'num_samples'"):
        SampleLedger(0)
    ledger = SampleLedger(5)
    two = torch.ones(2)
    for bad in (5, -1):
        with pytest.raises(IndexError, match=f"5 samples, but got dataset index {bad}"):
            ledger.record(torch.tensor([0, bad]), two, two)
    with pytest.raises(ValueError, match=r"'score' must have shape \(2,\)"):
        ledger.record(torch.tensor([0, 1]), two, torch.ones(3))
    assert ledger.seen.sum() == 0
