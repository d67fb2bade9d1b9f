"""The metrics over two gloo processes: ragged rows, padding, and a rank without any."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_nrml.metrics import FilterQuality, RetrievalMetrics, filter_quality, retrieval_metrics


def data():
    g = torch.Generator().manual_seed(0)
    label = torch.randint(6, (50,), generator=g)
    embedding = torch.randn(6, 5, generator=g)[label] + torch.randn(50, 5, generator=g)
    noise = torch.rand(50, generator=g) < 0.4
    return embedding, label, noise, torch.randn(50, generator=g) - noise.float()


PARTS = {
    "ragged batches": [[torch.arange(0, 20), torch.arange(20, 33)], [torch.arange(33, 50)]],
    "padded by a sampler": [[torch.arange(0, 50, 2)], [torch.cat([torch.arange(1, 50, 2), torch.arange(3)])]],
    "rank 1 has nothing": [[torch.arange(0, 50)], []],
    "rank 0 has nothing": [[], [torch.arange(0, 20), torch.arange(20, 50)]],
}
LATER = [torch.arange(3), torch.arange(3, 7)]


def update(metrics, rows):
    embedding, label, noise, score = data()
    metrics[0].update(embedding[rows], label[rows], rows)
    metrics[1].update(score[rows] > 0, noise[rows], score[rows])


def worker(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, parts in PARTS.items():
        metrics = RetrievalMetrics(), FilterQuality()
        for rows in parts[rank]:
            update(metrics, rows)
        first = [m.compute() for m in metrics]
        # after the gather each rank has its own rows back and can go on
        update(metrics, LATER[rank])
        results[name, rank] = first, [m.compute() for m in metrics]
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = mp.get_context("spawn").Manager().dict()
    mp.spawn(worker, (str(tmp_path_factory.mktemp("ddp") / "store"), found), nprocs=2)
    return dict(found)


@pytest.mark.parametrize("name", PARTS)
def test_two_ranks_equal_one_process(results, name):
    embedding, label, noise, score = data()
    want = retrieval_metrics(embedding, label)
    rows = torch.cat([r for rank in PARTS[name] for r in rank])
    more = torch.cat([rows, *LATER])
    for rank in (0, 1):
        first, second = results[name, rank]
        assert first[0] == pytest.approx(want)
        assert second[0] == pytest.approx(want)
        assert first[1] == pytest.approx(filter_quality(score[rows] > 0, noise[rows], score[rows]))
        assert second[1] == pytest.approx(filter_quality(score[more] > 0, noise[more], score[more]))
