"""Time and memory of the retrieval metrics beside pytorch-metric-learning's calculator.

Run: ``pytest -m benchmark -s tests/benchmarks/test_retrieval_speed.py`` (about 2 minutes on one core).
Each candidate runs in a process of its own, on one thread; CPU seconds, so that other load does not count,
and the growth of the peak resident memory during the call.
"""

from __future__ import annotations

import resource
import time

import pytest
import torch
import torch.multiprocessing as mp

CASES = {"10k, 100 classes": (10_000, 100), "60k, 11316 classes": (60_000, 11_316)}


def data(n, classes, dim=128):
    g = torch.Generator().manual_seed(0)
    label = torch.arange(n) % classes
    return torch.randn(classes, dim, generator=g)[label] + 1.3 * torch.randn(n, dim, generator=g), label


def ours(embedding, label):
    from lightning_nrml.metrics import retrieval_metrics

    retrieval_metrics(embedding[:500], label[:500] % 50)  # warm up imports and allocators
    return lambda: retrieval_metrics(embedding, label, ks=(1, 10))


def peer(embedding, label):
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    rows = torch.nn.functional.normalize(embedding)
    calculator.get_accuracy(rows[:500], label[:500] % 50)
    return lambda: calculator.get_accuracy(rows, label)


def product(embedding, label):
    """The floor: the same similarities by matrix product alone, into a reused buffer, in the best layout."""
    rows = torch.nn.functional.normalize(embedding).T.contiguous().T
    step = max(1, (32 << 20) // (4 * len(rows)))
    buffer = torch.empty(step, len(rows))

    def run():
        for part in rows.split(step):
            torch.mm(part, rows.T, out=buffer[: len(part)])
        return {}

    torch.mm(rows[:step], rows.T, out=buffer[: len(rows[:step])])
    return run


def worker(_, build, case, results):
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    call = build(*data(*CASES[case]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    answer = call()
    seconds = time.process_time() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results[build.__name__] = (seconds, megabytes, answer)


@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_faster_and_leaner_than_the_peer(case):
    results = mp.get_context("spawn").Manager().dict()
    for build in (product, ours, peer):
        mp.spawn(worker, (build, case, results), nprocs=1)
    print(f"\n{case} x 128 dimensions, one thread")
    for name, (seconds, megabytes, _) in results.items():
        print(f"  {name:8s} {seconds:7.2f} CPU s  {megabytes:8.0f} MB")
    (mine, my_memory, got), (its, its_memory, want) = results["ours"], results["peer"]
    assert got["recall@1"] == pytest.approx(want["precision_at_1"], abs=2e-4)
    assert got["map@r"] == pytest.approx(want["mean_average_precision_at_r"], abs=2e-4)
    assert got["r_precision"] == pytest.approx(want["r_precision"], abs=2e-4)
    assert mine < its
    assert my_memory <= its_memory  # at 10k either may hide below the interpreter's own peak
