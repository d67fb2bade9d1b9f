"""Samplers: what a batch holds, equality over world sizes, resume, and Lightning leaving them alone."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_nrml.data.samplers import (
    MPerClassSampler,
    NeighbourSampler,
    ShuffleSampler,
    UnpaddedSampler,
    _deal,
)

LABEL = torch.arange(12).repeat_interleave(10)  # 12 classes of 10 images


def batches(sampler, size=None):
    rows = list(sampler)
    size = size or sampler.batch_size
    assert len(rows) % size == 0
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def uneven_labels(seed=0, classes=40, most=9):
    sizes = np.random.default_rng(seed).integers(1, most, classes)
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), sizes)))


@pytest.mark.parametrize(
    ("size", "width", "rounds"), [(7, 3, 20), (5, 5, 4), (3, 8, 9), (1, 4, 3), (6, 4, 1)]
)
def test_deal_spreads_evenly_within_and_over_hands(size, width, rounds):
    hands = _deal(size, width, rounds, np.random.default_rng(0))
    assert hands.shape == (rounds, width)
    for hand in hands:
        count = np.bincount(hand, minlength=size)
        assert count.min() >= width // size
        assert count.max() <= -(-width // size)
        assert len(set(hand[:size].tolist())) == min(size, width)
    total = np.bincount(hands.ravel(), minlength=size)
    assert total.max() - total.min() <= 1


def test_deal_is_close_to_uniform():
    hands = _deal(9, 4, 9000, np.random.default_rng(1))
    first = np.bincount(hands[:, 0], minlength=9)
    assert np.abs(first - 1000).max() < 5 * np.sqrt(1000 * 8 / 9)


def test_deal_shuffles_hands_that_hold_every_card():
    hands = _deal(3, 8, 50, np.random.default_rng(0))
    assert len({tuple(hand[:3]) for hand in hands}) == 6


def test_batches_are_classes_times_m_distinct_images():
    for batch in batches(MPerClassSampler(LABEL, 4, 32)):
        assert sorted(Counter(LABEL[batch].tolist()).values()) == [4] * 8
        assert len(set(batch)) == 32
        groups = LABEL[batch].reshape(8, 4)  # a rank that takes whole groups keeps them whole
        assert (groups == groups[:, :1]).all()


def test_every_sample_comes_once_where_it_can():
    sampler = MPerClassSampler(LABEL, 5, 30)
    assert len(sampler) == 120
    assert sorted(sampler) == list(range(120))
    assert sorted(ShuffleSampler(120, 30)) == list(range(120))
    assert len(ShuffleSampler(30, 15, num_replicas=2, rank=0)) == 15  # as many samples as one batch takes


def test_classes_come_equally_often_and_their_images_in_turn():
    label = torch.tensor([0] * 50 + [1] * 6 + [2] * 7 + [3] * 57)
    drawn = Counter(MPerClassSampler(label, 3, 6, length=40))
    by_class = Counter(label[i].item() for i in drawn.elements())
    assert set(by_class.values()) == {60}
    for c in range(4):
        counts = [drawn[i] for i in (label == c).nonzero().flatten().tolist()]
        assert max(counts) - min(counts) <= 1


def test_small_classes_repeat_only_as_far_as_they_must():
    label = uneven_labels()
    sizes = torch.bincount(label)
    assert sizes.min() == 1
    for batch in batches(MPerClassSampler(label, 4, 32, length=50)):
        for c, count in Counter(label[batch].tolist()).items():
            assert count == 4
            images = [i for i in batch if label[i] == c]
            assert len(set(images)) == min(4, sizes[c].item())


@pytest.mark.parametrize("make", ["m_per_class", "shuffle"])
def test_two_ranks_see_together_what_one_process_sees(make):
    label = uneven_labels(3)
    keep = torch.rand(len(label), generator=torch.Generator().manual_seed(0)) > 0.3

    def sampler(batch_size, world, rank):
        common = {"num_replicas": world, "rank": rank, "seed": 5, "keep": keep}
        if make == "shuffle":
            return ShuffleSampler(len(label), batch_size, **common)
        return MPerClassSampler(label, 2, batch_size, **common)

    one, ranks = sampler(16, 1, 0), [sampler(8, 2, r) for r in range(2)]
    for epoch in (0, 3):
        for s in (one, *ranks):
            s.set_epoch(epoch)
        whole = batches(one)
        left, right = (batches(s) for s in ranks)
        assert len(whole) == len(left) == len(right) == one.num_batches
        assert [a + b for a, b in zip(left, right, strict=True)] == whole


@pytest.mark.parametrize("sampler", [MPerClassSampler(LABEL, 4, 16), ShuffleSampler(120, 16)])
def test_epochs_differ_and_global_state_does_not_matter(sampler):
    sampler.set_epoch(0)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = list(sampler)
    before = torch.get_rng_state()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert list(sampler) == first
    torch.manual_seed(0)
    list(sampler)
    assert torch.equal(torch.get_rng_state(), before)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_seed_changes_the_order():
    assert list(ShuffleSampler(50, 10, seed=1)) != list(ShuffleSampler(50, 10, seed=2))


@pytest.mark.parametrize("sampler", [MPerClassSampler(LABEL, 4, 16, length=9), ShuffleSampler(144, 16)])
def test_resume_skips_exactly_the_batches_done_and_only_once(sampler):
    full = list(sampler)
    sampler.start_batch = 4
    assert len(sampler) == len(full)  # progress counters include the batches done
    assert list(sampler) == full[64:]
    assert sampler.start_batch == 0
    assert list(sampler) == full
    sampler.start_batch = 9
    assert list(sampler) == []


def test_resume_reaches_through_a_dataloader_with_persistent_workers():
    sampler = ShuffleSampler(40, 8)
    full = list(sampler)
    loader = DataLoader(
        TensorDataset(torch.arange(40)),
        sampler=sampler,
        batch_size=8,
        drop_last=True,
        num_workers=1,
        persistent_workers=True,
    )
    sampler.start_batch = 2
    assert [int(i) for (b,) in loader for i in b] == full[16:]
    assert [int(i) for (b,) in loader for i in b] == full


def test_keep_is_obeyed_and_may_change_in_place():
    keep = torch.ones(120, dtype=torch.bool)
    samplers = [MPerClassSampler(LABEL, 4, 16, keep=keep), ShuffleSampler(120, 16, keep=keep)]
    assert [len(s) for s in samplers] == [112, 112]
    keep[::2] = False
    for s in samplers:
        rows = list(s)
        assert len(s) == len(rows) == 48
        assert all(i % 2 for i in rows)


def test_keep_with_too_few_classes_uses_classes_twice_with_other_images():
    keep = LABEL < 3
    sampler = MPerClassSampler(LABEL, 4, 32, keep=keep, length=6)
    for batch in batches(sampler):
        assert sorted(Counter(LABEL[batch].tolist()).values()) == [8, 12, 12]  # 8 groups of 4
        assert len(set(batch)) == 8 + 10 + 10
        assert max(Counter(batch).values()) <= 2
    keep[:] = (LABEL < 6) | (LABEL == 7)
    for batch in batches(sampler):
        assert len(set(batch)) == 32
        assert sorted(Counter(LABEL[batch].tolist()).values()) == [4] * 6 + [8]


def test_keep_with_one_image_left_still_makes_a_batch():
    keep = torch.zeros(120, dtype=torch.bool)
    keep[17] = True
    assert list(MPerClassSampler(LABEL, 4, 16, keep=keep)) == [17] * 16
    assert list(ShuffleSampler(120, 16, keep=keep)) == [17] * 16


def test_keep_that_drops_everything_is_ignored_with_a_warning():
    keep = torch.zeros(120, dtype=torch.bool)
    for s in (MPerClassSampler(LABEL, 4, 16, keep=keep), ShuffleSampler(120, 16, keep=keep)):
        assert len(s) == 112
        with pytest.warns(UserWarning, match="drops every training sample"):
            assert len(list(s)) == 112
    keep[5] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(s)) == 16


def test_unlabelled_samples_are_never_drawn():
    label = LABEL.clone()
    label[::3] = -1
    rows = list(MPerClassSampler(label, 4, 16, length=20))
    assert (label[rows] >= 0).all()


def test_at_least_one_batch():
    sampler = MPerClassSampler(torch.arange(8), 4, 32)
    assert len(sampler) == 32
    assert Counter(sampler) == dict.fromkeys(range(8), 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"m": 5, "batch_size": 32}, "batch_size=32 and m=5"),
        ({"m": 0, "batch_size": 32}, "m=0"),
        ({"m": 2, "batch_size": 32}, "needs 16 classes per batch, but the labels have 12"),
        ({"m": 4, "batch_size": 32, "num_replicas": 2, "rank": 1}, "on 2 process.*needs 16 classes"),
        ({"m": 4, "batch_size": 0}, "batch_size must be at least 1"),
        ({"m": 4, "batch_size": 8, "seed": -1}, "seed"),
        ({"m": 4, "batch_size": 8, "length": 0}, "length"),
        ({"m": 4, "batch_size": 8, "keep": torch.ones(7, dtype=torch.bool)}, r"shape \(120,\)"),
        ({"m": 4, "batch_size": 8, "keep": torch.ones(120)}, "bool"),
        ({"m": 4, "batch_size": 8, "label": torch.zeros(10, 3)}, r"\(10, 3\)"),
    ],
)
def test_m_per_class_says_what_is_wrong(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MPerClassSampler(**{"label": LABEL, **kwargs})


def test_shuffle_and_resume_say_what_is_wrong():
    with pytest.raises(ValueError, match="needs 20 training samples, but there are 12"):
        ShuffleSampler(12, 10, num_replicas=2, rank=0)
    sampler = ShuffleSampler(12, 4)
    sampler.start_batch = -1
    with pytest.raises(ValueError, match="start_batch"):
        list(sampler)


@pytest.mark.parametrize(("items", "world", "sizes"), [(21, 2, [11, 10]), (8, 4, [2] * 4), (2, 3, [1, 1, 0])])
def test_unpadded_covers_every_item_once_in_order(items, world, sizes):
    samplers = [UnpaddedSampler(items, world, r) for r in range(world)]
    assert [len(s) for s in samplers] == sizes == [len(list(s)) for s in samplers]
    assert [i for s in samplers for i in s] == list(range(items))


class _Plain(Sampler[int]):
    def __len__(self):
        return 120

    def __iter__(self):
        return iter(range(120))


def test_lightning_on_two_devices_leaves_them_alone():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    connector = trainer._data_connector
    data = TensorDataset(torch.arange(120))

    def loader(sampler):
        return DataLoader(data, sampler=sampler, batch_size=16, drop_last=True)

    assert connector._requires_distributed_sampler(loader(_Plain()))  # an ordinary sampler is replaced
    for sampler in (
        MPerClassSampler(LABEL, 4, 16, num_replicas=2, rank=1),
        ShuffleSampler(120, 16, num_replicas=2, rank=1),
        UnpaddedSampler(120, 2, 1),
    ):
        for mode in (RunningStage.TRAINING, RunningStage.VALIDATING, RunningStage.PREDICTING):
            given = loader(sampler)
            prepared = connector._prepare_dataloader(given, shuffle=False, mode=mode)
            assert prepared.batch_sampler.sampler is sampler
            drawn = [i for batch in prepared.batch_sampler for i in batch]
            whole = mode is RunningStage.PREDICTING  # where Lightning keeps the last incomplete batch
            assert drawn == list(sampler)[: None if whole else 16 * len(given)]


# ---- anchors with neighbours ------------------------------------------------------------------------


def neighbour_table(size=40, k=3):
    return (torch.arange(size)[:, None] + torch.arange(1, k + 1)) % size


def test_neighbour_batches_are_anchors_with_their_nearest_and_an_epoch_has_every_anchor_once():
    table = neighbour_table()
    sampler = NeighbourSampler(table, 16)
    assert len(sampler) == 160
    groups = torch.tensor(list(sampler)).view(-1, 4)
    assert torch.equal(groups[:, 1:], table[groups[:, 0]])
    assert sorted(groups[:, 0].tolist()) == list(range(40))
    sampler.set_epoch(1)
    assert list(sampler) != groups.flatten().tolist()


def test_neighbour_batches_of_two_ranks_are_those_of_one_process():
    one = batches(NeighbourSampler(neighbour_table(), 16, seed=3))
    two = [batches(NeighbourSampler(neighbour_table(), 8, 2, rank, seed=3)) for rank in (0, 1)]
    assert one == [a + b for a, b in zip(*two, strict=True)]


def test_missing_and_dropped_neighbours_are_replaced_by_the_anchor():
    table, keep = neighbour_table(), torch.ones(40, dtype=torch.bool)
    table[5] = -1
    keep[[6, 7]] = False
    groups = {g[0]: g for g in batches(NeighbourSampler(table, 4, keep=keep))}
    assert set(groups) == set(range(40)) - {6, 7}
    assert groups[5] == [5, 5, 5, 5]
    assert groups[4] == [4, 5, 4, 4]
    assert groups[10] == [10, 11, 12, 13]


def test_neighbour_table_is_read_when_an_epoch_starts_and_a_resume_skips_batches():
    table = torch.full((40, 3), -1)
    sampler = NeighbourSampler(table, 8)
    assert all(len(set(g)) == 1 for g in batches(sampler, 4))
    table.copy_(neighbour_table())
    whole = batches(sampler)
    sampler.start_batch = 7
    assert batches(sampler) == whole[7:]
    assert batches(sampler) == whole
    assert whole[0][1] == (whole[0][0] + 1) % 40


def test_neighbour_sampler_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="must be a multiple of 4, an anchor and its 3 neighbours, got 10"):
        NeighbourSampler(neighbour_table(), 10)
    with pytest.raises(ValueError, match="needs 50 anchors, but there are 40 training samples"):
        NeighbourSampler(neighbour_table(), 200)
    with pytest.raises(ValueError, match=r"integers of shape \(N, K\), got torch.float32 of shape \(4,\)"):
        NeighbourSampler(torch.rand(4), 4)
    assert list(NeighbourSampler(torch.tensor([[-1, -1, -1]]), 4)) == [0, 0, 0, 0]
