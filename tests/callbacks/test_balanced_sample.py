"""The sample that a map shows: bounded, balanced, and the same however the rows come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_nrml.callbacks.balanced_sample import BalancedSample, sample_order
from lightning_nrml.data.views.rng import row_hash

CPU = torch.device("cpu")


def rows(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, positions and labels of classes of these sizes, in random order."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    label = label[torch.randperm(len(label), generator=g)]
    return torch.randn(len(label), 3, generator=g), torch.arange(len(label)), label


def drawn(size: int, per_class: int, *parts: tuple[Tensor, ...], seed: int = 0):
    sample = BalancedSample(size, per_class, seed)
    for part in parts:
        sample.add(*part)
    return sample.gathered(CPU)


def slow_order(index: Tensor, label: Tensor, per_class: int, seed: int) -> list[int]:
    """By its definition, with lists."""
    hashed = row_hash(index, seed).tolist()
    of_class = dict(zip(label.tolist(), row_hash(label, seed, 1).tolist(), strict=True))
    left = {c: sorted((label == c).nonzero().flatten().tolist(), key=lambda r: hashed[r]) for c in of_class}
    order = []
    for c in sorted(of_class, key=lambda c: of_class[c]):
        order += left[c][:per_class]
        left[c] = left[c][per_class:]
    while any(left.values()):
        turn = [left[c].pop(0) for c in left if left[c]]
        order += sorted(turn, key=lambda r: hashed[r])
    return order


@pytest.mark.parametrize("per_class", [1, 3, 10])
def test_order_is_that_of_its_definition(per_class: int) -> None:
    _, index, label = rows([40, 7, 1, 0, 23, 2])
    got = sample_order(index * 5 + 3, label - 1, per_class, seed=4)  # -1 is a class, too
    assert got.tolist() == slow_order(index * 5 + 3, label - 1, per_class, seed=4)


def test_large_classes_give_what_small_ones_lack() -> None:
    counts = drawn(60, 10, rows([1000, 50, 3, 1])).label.bincount()
    assert counts.tolist() == [28, 28, 3, 1]


def test_of_many_classes_some_are_shown_rather_than_one_image_of_each() -> None:
    sample = drawn(100, 10, rows([20] * 500))
    classes, counts = sample.label.unique(return_counts=True)
    assert counts.tolist() == [10] * 10
    assert classes.max() > 100  # not the first ones


def test_neither_the_order_nor_the_batches_matter_and_memory_is_bounded() -> None:
    z, index, label = rows([300, 100, 20, 4, 1] + [9] * 30)
    whole = drawn(70, 4, (z, index, label))
    assert len(whole.index) == 70
    assert torch.equal(whole.index, whole.index.sort().values)
    assert torch.equal(whole.embedding, z[whole.index])
    assert torch.equal(whole.label, label[whole.index])
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    sample = BalancedSample(70, 4, 0)
    for part in order.split(13):
        sample.add(z[part], index[part], label[part])
        assert sum(map(len, sample._rows)) <= 2 * 70 + 13
    again = sample.gathered(CPU)
    assert torch.equal(again.index, whole.index)
    assert torch.equal(again.embedding, whole.embedding)
    assert again.seen == whole.seen == len(z)
    other = drawn(70, 4, (z, index, label), seed=1)
    assert set(other.index.tolist()) != set(whole.index.tolist())


def test_rows_are_chosen_evenly() -> None:
    """Each third of the rows gives 400, with a standard deviation of 15."""
    z, index, label = rows([3000, 3000])
    place = drawn(1200, 10, (z, index, label)).index
    thirds = torch.histc(place.float(), 3, 0, 6000)
    assert ((thirds - 400).abs() < 75).all(), thirds


def test_repeated_and_not_finite_rows() -> None:
    z, index, label = rows([5, 5])
    z[2, 0], z[3, 1] = torch.nan, torch.inf
    sample = drawn(20, 2, (z, index, label), (z[:1], index[:1], label[:1]))
    assert sample.index.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert (sample.not_finite, sample.seen) == (2, 11)
    assert sample.clean_label is None
    assert len(drawn(20, 2, (z[2:4], index[2:4], label[2:4])).index) == 0
    assert drawn(20, 2).embedding.shape == (0, 0)


def test_true_labels_go_with_their_rows() -> None:
    z, index, label = rows([30, 30])
    sample = drawn(10, 2, (z, index, label, index % 7 - 1))
    assert sample.clean_label is not None
    assert torch.equal(sample.clean_label, sample.index % 7 - 1)
