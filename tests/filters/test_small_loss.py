"""Small-loss selection: exact numbers, the window, ties and broken rows."""

from __future__ import annotations

import pytest
import torch

from lightning_nrml.filters import LossQuantile, SmallLoss
from lightning_nrml.filters.cut import SmoothedCut, share_cut
from lightning_nrml.types import FilterContext


def context(loss, embedding=None):
    loss = torch.as_tensor(loss)
    z = torch.ones(len(loss), 2) if embedding is None else embedding
    rows = torch.arange(len(loss))
    return FilterContext(z, rows % 3, rows, per_sample_loss=loss)


@pytest.mark.parametrize(
    ("rate", "n", "drop"), [(0.5, 8, 4), (0.29, 100, 28), (0.3, 10, 3), (0.9, 3, 2), (0.2, 4, 0)]
)
def test_small_loss_drops_exactly_the_largest(rate, n, drop) -> None:
    # int(0.29 * 100) is 28 in floating point: the same integer as Python's
    loss = torch.rand(n, generator=torch.Generator().manual_seed(n))
    selection = SmallLoss(rate).select(context(loss))
    assert int((~selection.keep).sum()) == drop == int(rate * n)
    if drop:
        assert float(loss[~selection.keep].min()) > float(loss[selection.keep].max())
        assert float(selection.threshold) == -float(loss[~selection.keep].min())
    else:
        assert selection.threshold.isnan()
    assert torch.equal(selection.score, -loss)


def test_the_quantile_is_averaged_over_the_window() -> None:
    part = LossQuantile(0.5, window=2)
    first = part.select(context([1.0, 2.0, 3.0, 4.0]))
    assert first.weight.tolist() == [1, 1, 0, 0]
    assert float(first.threshold) == -3
    second = part.select(context([1.0, 3.4, 5.0, 6.0]))  # own quantile 5, mean 4
    assert float(second.threshold) == -4
    assert second.weight.tolist() == [1, 1, 0, 0]
    third = part.select(context([4.5, 4.5001, 7.0, 9.0]))  # own 7, mean of 5 and 7 is 6
    assert float(third.threshold) == -6
    fourth = part.select(context([9.0, 9.5, 10.0, 11.0]))  # mean 8.5: nothing is below, its own 10 decides
    assert float(fourth.threshold) == -10
    assert fourth.weight.tolist() == [1, 1, 0, 0]


def test_ties_go_to_the_nearer_side_and_never_all() -> None:
    def dropped(values, rate):
        score = torch.tensor(values)
        return int((score <= share_cut(score, rate)).sum())

    assert dropped([0.0, 0.0, 0.0, 1.0, 2.0, 3.0], 0.34) == 3  # wanted 2: 3 is nearer than 0
    assert dropped([0.0, 0.0, 0.0, 0.0, 0.0, 3.0], 0.34) == 0  # wanted 2: 0 is nearer than 5
    assert dropped([1.0] * 6, 0.9) == 0
    assert dropped([0.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.99) == 1
    assert share_cut(torch.tensor([torch.nan, 1.0, 2.0]), 0.5) == 1
    assert share_cut(torch.zeros(0), 0.5).isnan()


def test_broken_losses_and_rows_are_dropped_and_do_not_count() -> None:
    z = torch.ones(7, 2)
    z[6] = torch.nan
    loss = [1.0, 2.0, 3.0, 4.0, torch.nan, torch.inf, 0.5]
    selection = SmallLoss(0.5).select(context(loss, z))
    assert selection.weight.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert selection.stats["nonfinite"].tolist() == [False] * 4 + [True] * 3
    assert selection.score[4:].isnan().all()


def test_a_batch_with_nothing_to_drop_leaves_the_window_alone() -> None:
    cut = SmoothedCut(3)
    cut.push(torch.tensor([1.0, 2.0]), 0.5)
    before = cut.window_values.clone()
    drop, value = cut.push(torch.tensor([0.5]), 0.5)
    assert not drop.any()
    assert value.isnan()
    assert torch.equal(cut.window_values.nan_to_num(), before.nan_to_num())


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"noise_rate must lie in \[0, 1\)"):
        SmallLoss(1.0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        LossQuantile(window=0)
    with pytest.raises(ValueError, match=r"SmallLoss needs per_sample_loss \(B,\)"):
        SmallLoss().select(FilterContext(torch.ones(2, 2), torch.zeros(2).long(), torch.arange(2)))
