"""FilterQuality against counts by hand and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

from lightning_nrml.metrics import FilterQuality, filter_quality


def draw(n=500, seed=0, levels=20):
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, generator=g) < 0.3
    score = torch.randint(levels, (n,), generator=g).float() - 8 * noise  # many ties
    return score > 4, noise, score


def test_by_hand():
    keep = torch.tensor([True, True, True, False, False])
    noise = torch.tensor([False, True, False, False, True])
    got = filter_quality(keep, noise, torch.tensor([0.9, 0.5, 0.5, 0.1, 0.0]))
    assert got["precision"] == pytest.approx(2 / 3)
    assert got["recall"] == pytest.approx(2 / 3)
    assert got["f1"] == pytest.approx(2 / 3)
    assert got["keep_rate"] == pytest.approx(3 / 5)
    # clean .9 .5 .1 against noisy .5 .0: 2 + 1.5 + 1 wins of 6
    assert got["auroc"] == pytest.approx(4.5 / 6)
    # from below: the noisy .0 (1 of 1), the clean .1, then .5 twice, one of them noisy (2 of 4)
    assert got["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)


def test_equals_scikit_learn():
    keep, noise, score = draw()
    got = filter_quality(keep, noise, score)
    precision, recall, f1, _ = precision_recall_fscore_support(~noise, keep, average="binary")
    assert (got["precision"], got["recall"], got["f1"]) == pytest.approx((precision, recall, f1))
    assert got["auroc"] == pytest.approx(roc_auc_score(~noise, score), abs=1e-9)
    assert got["average_precision"] == pytest.approx(average_precision_score(noise, -score), abs=1e-9)


def test_a_score_that_tells_nothing_finds_wrong_labels_as_often_as_they_are():
    keep, noise, score = draw()
    assert filter_quality(keep, noise, 0 * score)["average_precision"] == pytest.approx(
        float(noise.float().mean())
    )
    assert filter_quality(keep, noise, -noise.float())["average_precision"] == 1.0


def test_sd_is_that_of_delong_by_hand():
    """Clean .9 .5 .2 against noisy .4 .1: shares of wins 1, 1, 1/2 of the clean and 2/3, 1 of the noisy."""
    noise = torch.tensor([False, False, False, True, True])
    got = filter_quality(~noise, noise, torch.tensor([0.9, 0.5, 0.2, 0.4, 0.1]))
    assert got["auroc"] == pytest.approx(5 / 6)
    assert got["auroc_sd"] == pytest.approx(math.sqrt((1 / 12) / 3 + (1 / 18) / 2))


def test_sd_matches_the_spread_over_draws():
    values = [filter_quality(*draw(n=300, seed=s)) for s in range(300)]
    spread = np.std([v["auroc"] for v in values])
    assert np.mean([v["auroc_sd"] for v in values]) == pytest.approx(spread, rel=0.12)


def test_nan_scores_leave_only_the_auroc():
    keep, noise, score = draw()
    score[::3] = torch.nan
    got = filter_quality(keep, noise, score)
    known = ~score.isnan()
    assert got["auroc"] == pytest.approx(roc_auc_score(~noise[known], score[known]), abs=1e-9)
    want = average_precision_score(noise[known], -score[known])
    assert got["average_precision"] == pytest.approx(want, abs=1e-9)
    assert got["precision"] == filter_quality(keep, noise)["precision"]


def test_infinite_scores_rank_and_monotone_maps_change_nothing():
    keep, noise, score = draw()
    lowest = score == score.min()
    for key in ("auroc", "average_precision"):
        want = filter_quality(keep, noise, score)[key]
        assert filter_quality(keep, noise, score.exp())[key] == want
        assert filter_quality(keep, noise, score.masked_fill(lowest, -torch.inf))[key] == want


def test_large_samples_rank_exactly():
    # mid-ranks above 2**24 need float64; an order-free score must give the known area
    n = 2**20
    score = torch.arange(n).float()
    noise = torch.arange(n) < n // 2
    assert filter_quality(score > 0, noise, score)["auroc"] == 1.0
    assert filter_quality(score > 0, ~noise, score)["auroc"] == 0.0


def test_undefined_values_are_nan():
    clean, none = torch.zeros(4, dtype=torch.bool), torch.zeros(4)
    got = filter_quality(none, clean, torch.rand(4))
    assert math.isnan(got["precision"])
    assert got["recall"] == 0
    assert got["keep_rate"] == 0
    assert math.isnan(got["auroc"])
    assert math.isnan(got["average_precision"])
    all_noise = filter_quality(none + 1, ~clean, torch.rand(4))
    assert math.isnan(all_noise["average_precision"])
    assert math.isnan(all_noise["recall"])
    assert all_noise["precision"] == 0
    assert all(math.isnan(v) for v in filter_quality(none[:0], clean[:0], none[:0]).values())


def test_weights_from_one_half_are_kept_and_multi_label_is_flat():
    keep, noise, score = draw(n=60)
    want = filter_quality(keep, noise, score)
    weight = torch.where(keep, torch.linspace(0.5, 1, 60), torch.linspace(0, 0.49, 60))
    assert filter_quality(weight, noise, score) == want
    assert filter_quality(weight.view(20, 3), noise.view(20, 3), score.view(20, 3)) == want


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"same shape, got \[\(3,\), \(4,\), None\]"):
        filter_quality(torch.ones(3), torch.ones(4))


def test_metric_accumulates_and_resets():
    keep, noise, score = draw()
    metric = FilterQuality()
    for rows in torch.arange(500).split(130):
        metric.update(keep[rows], noise[rows], score[rows].bfloat16())
    assert metric.compute() == pytest.approx(filter_quality(keep, noise, score))
    metric.reset()
    metric.update(keep, noise)
    got = metric.compute()
    assert got["precision"] == filter_quality(keep, noise)["precision"]
    assert math.isnan(got["auroc"])


def label_case(n=200, labels=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    given = (torch.rand(n, labels, generator=g) < torch.tensor([0.5, 0.2, 0.1, 0.0])[:labels]).long()
    noise = torch.rand(n, labels, generator=g) < 0.3
    score = torch.randn(n, labels, generator=g) - 2 * noise
    score[::7] = torch.nan
    return score > -1.5, noise, score, given


def test_per_label_counts_equal_a_loop():
    keep, noise, score, given = label_case()
    metric = FilterQuality(4)
    for rows in torch.arange(200).split(33):
        metric.update(keep[rows], noise[rows], score[rows], given[rows])
    got, table = metric.compute(), metric.per_label()
    flat = filter_quality(keep, noise, score)
    assert {k: got[k] for k in flat} == pytest.approx(flat)
    for value, kind in enumerate(("missing", "extra")):
        own = given == value
        caught, dropped, wrong = (~keep & noise & own), (~keep & own), (noise & own)
        assert got[f"{kind}_precision"] == pytest.approx(float(caught.sum() / dropped.sum()))
        assert got[f"{kind}_recall"] == pytest.approx(float(caught.sum() / wrong.sum()))
        known = own & ~score.isnan()
        want = roc_auc_score(~noise[known], score[known])
        assert got[f"{kind}_auroc"] == pytest.approx(want, abs=1e-9)
        for c in range(4):
            for key, whole in (("precision", dropped), ("recall", wrong)):
                found = float(table[f"{kind}_{key}"][c])
                count = int(whole[:, c].sum())
                assert (
                    math.isnan(found)
                    if not count
                    else found == pytest.approx(int(caught[:, c].sum()) / count)
                )
    assert math.isnan(float(table["extra_recall"][3]))  # nobody has the last label
    metric.reset()
    assert int(metric.label_counts.sum()) == 0


def test_per_label_needs_the_given_labels():
    keep, noise, score, given = label_case()
    for label in (None, given[:, :2]):
        with pytest.raises(ValueError, match=r"FilterQuality\(num_labels=4\) needs"):
            FilterQuality(4).update(keep, noise, score, label)


def test_weights_below_one_half_are_dropped_by_label_too():
    keep, noise, label = torch.tensor([[0.3], [0.7]]), torch.tensor([[True], [False]]), torch.ones(2, 1)
    metric = FilterQuality(num_labels=1)
    metric.update(keep, noise, None, label)
    values = metric.compute()
    assert values["extra_precision"] == values["extra_recall"] == 1.0
