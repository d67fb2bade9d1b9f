"""The known-mask filter."""

import pytest
import torch

from lightning_nrml.filters import FixedFilter
from lightning_nrml.types import FilterContext

MASK = [True, False, True, True, False]


def context(index):
    index = torch.tensor(index)
    return FilterContext(torch.randn(len(index), 4), torch.zeros_like(index), index)


@pytest.mark.parametrize(
    "mask", [MASK, torch.tensor(MASK), [1, 0, 1, 1, 0], torch.tensor(MASK).float()], ids=repr
)
def test_weight_is_the_mask_by_dataset_index(mask):
    selection = FixedFilter(mask).select(context([4, 0, 3, 1, 0]))
    assert selection.weight.tolist() == [0, 1, 1, 0, 1]
    assert selection.weight.dtype is torch.float32
    assert selection.score.tolist() == [-torch.inf, 0, 0, -torch.inf, 0]


def test_whole_set_gives_the_same_decision_as_batches():
    filter = FixedFilter(MASK)
    score = filter.score(context(range(5)))
    assert filter.select_scores(score).keep.tolist() == MASK
    assert filter.select_scores(torch.tensor([torch.nan, -torch.inf, -3.0])).keep.tolist() == [
        True,
        False,
        True,
    ]
    assert filter.granularities == ("batch", "epoch")


@pytest.mark.parametrize("index", [5, -1])
def test_index_outside_the_mask_names_it(index):
    with pytest.raises(
        IndexError, match=rf"mask of FixedFilter has 5 samples, but got dataset index {index}"
    ):
        FixedFilter(MASK).select(context([0, index]))


def test_mask_may_come_later_but_must_come():
    filter = FixedFilter()
    with pytest.raises(RuntimeError, match="no mask"):
        filter.select(context([0]))
    filter.set_mask(MASK)
    assert filter.select(context([0, 1])).keep.tolist() == [True, False]


@pytest.mark.parametrize("mask", [[0, 2, 3], [[True, False]], []])
def test_malformed_masks_are_refused(mask):
    with pytest.raises(ValueError, match="mask must"):
        FixedFilter(mask)


def test_mask_is_copied_saved_and_restored():
    mask = torch.tensor(MASK)
    filter = FixedFilter(mask)
    mask.fill_(False)
    assert filter.clean.tolist() == MASK
    other = FixedFilter([False] * 5)
    other.load_state_dict(filter.state_dict())
    assert other.clean.tolist() == MASK
    without = FixedFilter()
    without.load_state_dict(filter.state_dict())
    assert without.clean.tolist() == MASK
