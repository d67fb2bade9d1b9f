"""FeatureQueue against a plain Python list, for every batch size and both ways of writing."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_nrml.memory import FeatureQueue
from lightning_nrml.memory.writes import wanted_rows


def _contents(queue: FeatureQueue) -> list[tuple[float, int, int]]:
    z, label = queue.get()
    return sorted(zip(z[:, 0].tolist(), label.tolist(), queue.get_index().tolist(), strict=True))


@pytest.fixture(params=["slices", "masked"])
def way(request, monkeypatch):
    """The masked way is the one for GPUs; here it runs on the CPU."""
    if request.param == "masked":

        def enqueue(self, z, label=None, index=None, keep=None):
            z = z.detach().to(self.embedding)
            pairs = [(self.embedding, z), (self.index, index), (self.label, label)]
            self._write_masked([p for p in pairs if p[0] is not None], wanted_rows(z, keep))

        monkeypatch.setattr(FeatureQueue, "enqueue", enqueue)
    return request.param


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize(
    "batches", [[4, 4, 4, 4], [1] * 12, [10, 3], [25], [3, 25, 2], [0, 5, 0, 7], [9, 2, 10]]
)
def test_holds_the_newest_rows_for_any_batch_size(way, size, batches):
    queue = FeatureQueue(size, 2)
    newest: list[tuple[float, int, int]] = []
    start = 0
    for n in batches:
        rows = torch.arange(start, start + n)
        queue.enqueue(torch.stack([rows.float(), -rows.float()], dim=1), rows % 7, rows + 100)
        newest = (newest + [(float(r), int(r) % 7, int(r) + 100) for r in rows])[-size:]
        start += n
        assert _contents(queue) == newest
        assert len(queue) == int(queue.count) == len(newest)
    assert torch.equal(queue.embedding[:, 0], -queue.embedding[:, 1])


def test_rows_are_written_in_ring_order(way):
    queue = FeatureQueue(5, 1)
    for n, start in ((3, 0), (3, 3)):
        rows = torch.arange(start, start + n)
        queue.enqueue(rows[:, None].float(), rows)
    assert queue.label.tolist() == [5, 1, 2, 3, 4]
    assert int(queue.pointer) == 1


@pytest.mark.parametrize("size", [2, 4, 20])
def test_dropped_and_non_finite_rows_never_enter(way, size):
    generator = torch.Generator().manual_seed(size)
    queue = FeatureQueue(size, 3)
    newest: list[int] = []
    for step in range(12):
        z = torch.rand(6, 3, generator=generator)
        index = torch.arange(6) + 6 * step
        keep = torch.rand(6, generator=generator) > 0.4
        bad = torch.rand(6, generator=generator) > 0.7
        z[bad, step % 3] = [math.nan, math.inf, -math.inf][step % 3]
        queue.enqueue(z, index, index, keep=keep)
        newest = (newest + index[keep & ~bad].tolist())[-size:]
        assert sorted(queue.get_index().tolist()) == newest
        assert queue.get()[0].isfinite().all()


def test_nothing_kept_changes_nothing(way):
    queue = FeatureQueue(4, 2)
    queue.enqueue(torch.ones(3, 2), torch.arange(3))
    before = {k: v.clone() for k, v in queue.state_dict().items()}
    queue.enqueue(torch.full((5, 2), math.nan), torch.arange(5))
    queue.enqueue(torch.zeros(2, 2), torch.arange(2), keep=torch.zeros(2))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_small_weight_keeps_a_row(way):
    queue = FeatureQueue(4, 1)
    queue.enqueue(torch.arange(3.0)[:, None], torch.arange(3), keep=torch.tensor([0.3, 0.0, math.nan]))
    assert queue.get()[1].tolist() == [0]


def test_without_labels_and_index(way):
    queue = FeatureQueue(3, 2, with_label=False)
    queue.enqueue(torch.ones(2, 2, dtype=torch.bfloat16))
    z, label = queue.get()
    assert z.dtype is torch.float32
    assert z.tolist() == [[1, 1], [1, 1]]
    assert label is None
    assert queue.get_index().tolist() == [-1, -1]


def test_resume_continues_at_the_same_row(way):
    def feed(queue: FeatureQueue, steps: range) -> None:
        for step in steps:
            rows = torch.arange(4) + 4 * step
            queue.enqueue(rows[:, None].float(), rows, rows)

    straight, first, second = FeatureQueue(10, 1), FeatureQueue(10, 1), FeatureQueue(10, 1)
    feed(straight, range(9))
    feed(first, range(5))
    feed(second, range(3))  # what is loaded replaces everything
    assert len(second) == 10
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    feed(second, range(5, 9))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_loading_a_part_filled_queue_into_a_full_one_shortens_it():
    full, part = FeatureQueue(3, 1), FeatureQueue(3, 1)
    full.enqueue(torch.ones(3, 1), torch.arange(3))
    part.enqueue(torch.ones(1, 1), torch.arange(1))
    assert len(full) == 3
    full.load_state_dict(part.state_dict())
    assert len(full.get()[0]) == 1


def test_reset_empties():
    queue = FeatureQueue(3, 1)
    for rows in (5, 1):  # leaves the pointer between the ends
        queue.enqueue(torch.ones(rows, 1), torch.arange(rows), torch.arange(rows))
    assert len(queue) == 3
    queue.reset()
    for name, value in FeatureQueue(3, 1).state_dict().items():
        assert torch.equal(value, queue.state_dict()[name])
    assert len(queue) == 0


def test_state_has_fixed_shape_and_is_written_in_place():
    queue = FeatureQueue(4, 2)
    before = {k: (v.data_ptr(), v.shape) for k, v in queue.state_dict().items()}
    assert set(before) == {"embedding", "label", "index", "pointer", "count"}
    queue.enqueue(torch.ones(3, 2), torch.arange(3))
    assert {k: (v.data_ptr(), v.shape) for k, v in queue.state_dict().items()} == before


def test_stored_rows_carry_no_gradient_and_survive_changes_of_the_source(way):
    queue = FeatureQueue(4, 2)
    z = torch.ones(2, 2, requires_grad=True)
    queue.enqueue(z, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        z.zero_()
    assert not queue.get()[0].requires_grad
    assert queue.get()[0].sum() == 4


@pytest.mark.parametrize("arguments", [(0, 4), (-1, 4), (4, 0), (2.5, 4), (True, 4)])
def test_constructor_refuses_senseless_sizes(arguments):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        FeatureQueue(*arguments)


def test_enqueue_names_what_is_wrong():
    queue = FeatureQueue(4, 2)
    label = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rows of 2 values.*\(3, 5\)"):
        queue.enqueue(torch.ones(3, 5), label)
    with pytest.raises(ValueError, match="needs 'label'"):
        queue.enqueue(torch.ones(3, 2))
    with pytest.raises(ValueError, match="takes no 'label'"):
        FeatureQueue(4, 2, with_label=False).enqueue(torch.ones(3, 2), label)
    with pytest.raises(ValueError, match=r"'index' must have shape \(3,\)"):
        queue.enqueue(torch.ones(3, 2), label, label[:2])
    with pytest.raises(ValueError, match=r"'keep' must have shape \(3,\)"):
        queue.enqueue(torch.ones(3, 2), label, keep=torch.ones(3, 3))
    assert len(queue) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_enqueue_on_a_gpu_never_waits():
    queue = FeatureQueue(10, 2).cuda()
    z, label = torch.rand(4, 2, device="cuda"), torch.arange(4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            queue.enqueue(z, label, label, keep=label > 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(queue) == 10
    assert 0 not in queue.get()[1].tolist()
