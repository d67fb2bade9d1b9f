"""PRISM's time per step beside pytorch-metric-learning's memory with centres rebuilt from it.

Run: ``OMP_NUM_THREADS=1 pytest tests/benchmarks/test_prism_speed.py -m benchmark -s``.

The peer does less than PRISM's step (no threshold window, no bookkeeping of evicted rows): it enqueues
the batch with ``CrossBatchMemory.add_to_memory``, makes class centres by one ``index_add_`` over the
memory, and takes the softmax of the batch against them. "product alone" is the unavoidable part of both: the
cosines to all centres and their exponentials. Medians of process CPU time on one thread, the three
measured in turns so that other work on the machine hits all alike.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_nrml.filters import PRISM
from lightning_nrml.types import FilterContext, Selection

BATCH, DIM, STEPS = 64, 128, 60


def _cpu_ms(step, *args: Tensor) -> float:
    start = time.process_time()
    step(*args)
    return (time.process_time() - start) * 1e3


def _filter_step(memory: Tensor, label: Tensor, num_classes: int):
    filter = PRISM(num_classes, DIM, memory_size=len(memory))
    everything = FilterContext(memory, label, torch.arange(len(label)))
    filter.update(everything, Selection.keep_all(label))
    assert filter.filled.all()

    def step(x: Tensor, y: Tensor, index: Tensor) -> None:
        ctx = FilterContext(x, y, index)
        filter.update(ctx, filter.select(ctx))

    return step, filter


def _peer_step(memory: Tensor, label: Tensor, num_classes: int):
    from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory

    bank = CrossBatchMemory(ContrastiveLoss(), DIM, memory_size=len(memory))
    bank.add_to_memory(memory, label, len(label))

    def step(x: Tensor, y: Tensor, index: Tensor) -> None:
        labels = bank.label_memory
        total = torch.zeros(num_classes, DIM).index_add_(0, labels, bank.embedding_memory)
        centres = total / torch.bincount(labels, minlength=num_classes).clamp_min(1).unsqueeze(1)
        score = (x @ centres.T).log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
        keep = score > score.kthvalue(BATCH // 2).values
        bank.add_to_memory(x[keep], y[keep], int(keep.sum()))

    return step


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("memory_size", "num_classes", "goal"), [(60_000, 1_000, 0.6), (60_000, 11_000, 3.5)]
)
def test_step_beside_pytorch_metric_learning(memory_size, num_classes, goal):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        g = torch.Generator().manual_seed(0)
        label = torch.arange(memory_size) % num_classes
        memory = normalize(torch.randn(memory_size, DIM, generator=g))
        ours, filter = _filter_step(memory, label, num_classes)
        peer = _peer_step(memory, label, num_classes)
        index = torch.randint(memory_size, (STEPS, BATCH), generator=g)
        noise = torch.randn(STEPS, BATCH, DIM, generator=g)
        times: dict[str, list[float]] = {"ours": [], "peer": [], "product alone": []}
        for i, e in zip(index, noise, strict=True):
            batch = (normalize(memory[i] + 0.05 * e), label[i], i)
            times["ours"].append(_cpu_ms(ours, *batch))
            times["peer"].append(_cpu_ms(peer, *batch))
            times["product alone"].append(
                _cpu_ms(lambda x, y, i: (x @ filter.centers.T).exp_().sum(1), *batch)
            )
    finally:
        torch.set_num_threads(threads)
    print(f"\nmemory {memory_size}, classes {num_classes}, batch {BATCH}, D {DIM}; goal {goal} ms")
    print(f"{'':24s}{'median ms':>10s}{'best ms':>10s}")
    for name, values in times.items():
        print(f"{name:24s}{statistics.median(values):10.2f}{min(values):10.2f}")
    assert filter.count == memory_size
    assert statistics.median(times["ours"]) < statistics.median(times["peer"])
