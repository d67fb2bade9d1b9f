"""Multi-label metrics: equal to scikit-learn, absent classes, thresholds, streaming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from lightning_nrml.metrics import MultiLabelMetrics, multilabel_metrics
from lightning_nrml.metrics.multilabel import average_precision, best_thresholds


def data(n=80, labels=6, ties=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(n, labels, generator=g) < torch.linspace(0.05, 0.7, labels)
    prob = torch.sigmoid(torch.randn(n, labels, generator=g) + 1.5 * target - 1)
    return (prob.mul(8).round() / 8 if ties else prob), target.long()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_scikit_learn(ties, seed):
    prob, target = data(ties=ties, seed=seed)
    got = multilabel_metrics(prob, target)
    p, t = prob.numpy(), target.numpy()
    assert got["map_macro"] == pytest.approx(average_precision_score(t, p, average="macro"), abs=1e-12)
    assert got["map_micro"] == pytest.approx(average_precision_score(t, p, average="micro"), abs=1e-12)
    np.testing.assert_allclose(got["ap"].numpy(), average_precision_score(t, p, average=None), atol=1e-12)
    for average in ("macro", "micro"):
        want = f1_score(t, p >= 0.5, average=average)
        assert got[f"f1_{average}"] == pytest.approx(want, abs=1e-12)
    np.testing.assert_allclose(got["f1"].numpy(), f1_score(t, p >= 0.5, average=None), atol=1e-12)
    np.testing.assert_allclose(got["calibration"].numpy(), p.mean(0) - t.mean(0), atol=1e-6)
    assert got["calibration_gap"] == pytest.approx(float(p.mean() - t.mean()), abs=1e-6)


def test_average_precision_by_hand():
    score = torch.tensor([0.9, 0.8, 0.7, 0.6])[:, None]
    target = torch.tensor([1, 0, 1, 0])[:, None].bool()
    assert average_precision(score, target).item() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    one_score = torch.full((4, 1), 0.3)  # no ranking: AP = prevalence, whatever the order of rows
    assert average_precision(one_score, target).item() == 0.5
    assert average_precision(one_score, target.flip(0)).item() == 0.5


def test_absent_classes_are_left_out_and_counted():
    prob, target = data()
    target[:, 2] = 0
    got = multilabel_metrics(prob, target)
    kept = [0, 1, 3, 4, 5]
    rest = multilabel_metrics(prob[:, kept], target[:, kept])
    assert got["num_absent"] == 1
    assert math.isnan(got["ap"][2])
    assert math.isnan(got["f1"][2])
    assert got["map_macro"] == pytest.approx(rest["map_macro"])
    assert got["f1_macro"] == pytest.approx(rest["f1_macro"])
    assert got["f1_micro"] < rest["f1_micro"], "its false positives count in the pooled value"
    assert math.isfinite(got["map_micro"])
    assert got["calibration"][2] == pytest.approx(prob[:, 2].mean().item(), abs=1e-6)
    gap = (prob - target).mean(0)  # a class that nobody has still has a gap: what is predicted for it
    assert got["calibration_gap"] == pytest.approx(gap.mean().item(), abs=1e-6)
    assert got["calibration_gap_abs"] == pytest.approx(gap.abs().mean().item(), abs=1e-6)
    tuned = multilabel_metrics(prob, target, class_threshold=torch.full((6,), 0.4))
    some = multilabel_metrics(prob[:, kept], target[:, kept], threshold=0.4)
    assert math.isnan(tuned["f1_tuned"][2])
    assert tuned["f1_macro_tuned"] == pytest.approx(some["f1_macro"])
    nothing = multilabel_metrics(prob, torch.zeros_like(target))
    for key in ("map_macro", "map_micro", "f1_macro", "f1_micro"):
        assert math.isnan(nothing[key]), key
    assert nothing["num_absent"] == 6
    full = multilabel_metrics(prob, torch.ones_like(target))
    assert full["map_macro"] == full["map_micro"] == 1.0


def test_macro_ignores_shifts_between_classes_and_micro_does_not():
    prob, target = data()
    shifted = prob * torch.linspace(0.01, 1, 6)
    one, two = multilabel_metrics(prob, target), multilabel_metrics(shifted, target)
    assert one["map_macro"] == pytest.approx(two["map_macro"], abs=1e-12)
    assert abs(one["map_micro"] - two["map_micro"]) > 0.01
    assert two["calibration_gap"] < one["calibration_gap"]


def test_gaps_of_classes_cancel_in_the_mean_and_not_in_its_size():
    got = multilabel_metrics(
        torch.tensor([[0.75, 0.25]]).repeat(4, 1), torch.tensor([[1, 0], [0, 1]]).repeat(2, 1)
    )
    assert got["calibration"].tolist() == [0.25, -0.25]
    assert (got["calibration_gap"], got["calibration_gap_abs"]) == (0, 0.25)


@pytest.mark.parametrize("ties", [False, True])
def test_best_thresholds_beat_every_other_one(ties):
    prob, target = data(ties=ties)
    found = best_thresholds(prob, target)
    for c in range(6):
        values = {t: f1_score(target[:, c], prob[:, c] >= t) for t in prob[:, c].unique().tolist()}
        best = max(values.values())
        assert found[c].item() == max(t for t, v in values.items() if v == best)
    tuned = multilabel_metrics(prob, target, class_threshold=found)
    assert tuned["f1_macro_tuned"] > tuned["f1_macro"]
    assert (tuned["f1_tuned"] >= tuned["f1"]).all()
    predicted = (prob >= found).numpy()
    assert tuned["f1_micro_tuned"] == pytest.approx(f1_score(target.numpy(), predicted, average="micro"))
    target[:, 1] = 0
    assert best_thresholds(prob, target, 0.35)[1] == pytest.approx(0.35)


def test_of_equally_good_thresholds_the_highest_is_best():
    prob, target = torch.tensor([[0.9], [0.8], [0.7], [0.6]]), torch.tensor([[1], [0], [0], [1]])
    assert best_thresholds(prob, target).item() == pytest.approx(0.9)  # F1 = 2/3 there and at .6


def test_best_thresholds_of_wide_probabilities_reach_their_own_rows():
    prob = torch.tensor([[0.1], [0.7]], dtype=torch.float64)  # 0.1 becomes larger in float32
    target = torch.ones(2, 1)
    assert best_thresholds(prob, target).item() == 0.1
    tuned = multilabel_metrics(prob, target, class_threshold=best_thresholds(prob, target))
    assert tuned["f1_macro_tuned"] == 1
    assert best_thresholds(prob.half(), target).dtype is torch.float32


def test_streaming_in_any_batches_and_without_repeats():
    prob, target = data()
    want = multilabel_metrics(prob, target)
    metric = MultiLabelMetrics(6)
    index = torch.arange(len(prob))
    for rows in (*index.split(7), torch.tensor([3, 79, 3])):  # the last rows come from a sampler that pads
        metric.update(prob[rows], target[rows], rows)
    got = metric.compute()
    for key in ("map_macro", "map_micro", "f1_macro", "f1_micro", "calibration_gap", "num_samples"):
        assert got[key] == pytest.approx(want[key], abs=1e-9), key
    torch.testing.assert_close(got["ap"], want["ap"])
    torch.testing.assert_close(got["best_threshold"], best_thresholds(prob, target))
    first = MultiLabelMetrics(6)
    for rows in (torch.tensor([5, 5, 3]), *index.split(40)):  # repeats before all others
        first.update(prob[rows].requires_grad_(), target[rows], rows)
    assert not any(part.requires_grad for part in first.prob), "else the graph of every batch is kept"
    again = first.compute()
    assert again["map_macro"] == pytest.approx(want["map_macro"], abs=1e-9)
    assert again["f1_micro"] == pytest.approx(want["f1_micro"], abs=1e-9)
    low = MultiLabelMetrics(6, threshold=0.2)
    low.update(prob, target)
    assert low.compute()["f1_macro"] == pytest.approx(multilabel_metrics(prob, target, 0.2)["f1_macro"])
    nobody = MultiLabelMetrics(1, threshold=0.35)
    nobody.update(torch.ones(2, 1), torch.zeros(2, 1))
    assert nobody.compute()["best_threshold"].item() == pytest.approx(0.35)
    metric.reset()
    metric.update(prob.half(), target.bool())
    assert metric.compute()["map_macro"] == pytest.approx(want["map_macro"], abs=0.02)


def test_no_rows_is_nan_not_zero():
    got = MultiLabelMetrics(3).compute()
    assert math.isnan(got["map_macro"])
    assert math.isnan(got["map_micro"])
    assert got["num_samples"] == 0


def test_errors_name_what_is_wrong():
    prob, target = data()
    metric = MultiLabelMetrics(6)
    for call, words in {
        lambda: metric.update(prob[:, :5], target[:, :5]): "num_labels is 6",
        lambda: metric.update(prob, target[:4]): "must both be",
        lambda: metric.update(prob, target, torch.arange(3)): "'index' must have shape",
        lambda: metric.update(prob * 9 - 4, target): "apply a sigmoid",
        lambda: metric.update(prob.log().sqrt(), target): "is nan",
        lambda: metric.update(prob, target + 1): "0 and 1 are accepted",
        lambda: MultiLabelMetrics(0): "at least 1",
        lambda: MultiLabelMetrics(3, class_threshold=torch.ones(2)): "class_threshold",
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
