"""PRISM's time per step beside the way the official code does it, and beside a plain memory.

Run: ``OMP_NUM_THREADS=1 pytest tests/benchmarks/test_prism_speed.py -m benchmark -s``.

"official style" is written from the description of the published step: a Python loop over the classes
kept in the last batch, each with a mask over the memory, and one over the batch, each row with a product
with all centres. "XBM + centres" does less than PRISM (no threshold window, no suggestions): it enqueues
with pytorch-metric-learning's ``CrossBatchMemory.add_to_memory``, makes all centres by one ``index_add_``
over the memory and takes the softmax. "product alone" is the unavoidable part of all: the cosines to
all centres and their exponentials. Process CPU time on one thread, all measured in turns, so that other work
on the machine hits all alike, without the first steps of each turn: those find the caches full of what the
one before has read, and the reference numbers have each in a process of its own. Ratios are of medians.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_nrml.filters import PRISM
from lightning_nrml.types import FilterContext, Selection

BATCH, DIM, STEPS, TURN, WARM = 64, 128, 240, 60, 10


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


def _official_step(memory: Tensor, label: Tensor, num_classes: int):
    memory, label = memory.clone(), label.clone()
    centres = torch.zeros(num_classes, DIM).index_add_(0, label, memory)
    centres /= torch.bincount(label, minlength=num_classes).unsqueeze(1)
    state: dict[str, Any] = {"touched": [], "window": [], "pointer": 0}

    def step(x: Tensor, y: Tensor, index: Tensor) -> None:
        for k in state["touched"]:
            centres[k] = memory[label == k].mean(0)
        prob = torch.zeros(len(x))
        for i, k in enumerate(y.tolist()):
            similarity = (centres @ x[i]).exp()
            prob[i] = similarity[k] / similarity.sum()
        state["window"] = [*state["window"], prob.sort().values[len(x) // 2 - 1]][-30:]
        keep = prob > torch.stack(state["window"]).mean()
        kept, pointer = int(keep.sum()), state["pointer"]
        if pointer + kept > len(memory):
            pointer = len(memory) - kept
        memory[pointer : pointer + kept] = x[keep]
        label[pointer : pointer + kept] = y[keep]
        state["pointer"] = (pointer + kept) % len(memory)
        state["touched"] = y[keep].unique().tolist()

    return step


@pytest.mark.benchmark
@pytest.mark.parametrize(("memory_size", "num_classes", "goal"), [(60_000, 1_000, 15), (60_000, 11_000, 7)])
def test_step_beside_the_official_style(memory_size, num_classes, goal):
    g = torch.Generator().manual_seed(0)
    label = torch.arange(memory_size) % num_classes
    memory = normalize(torch.randn(memory_size, DIM, generator=g))
    ours, filter = _filter_step(memory, label, num_classes)
    steps = {
        "ours": ours,
        "official style": _official_step(memory, label, num_classes),
        "XBM + centres": _peer_step(memory, label, num_classes),
        "product alone": lambda x, y, i: (x @ filter.centers.T).exp_().sum(1),
    }
    index = torch.randint(memory_size, (STEPS, BATCH), generator=g)
    noise = torch.randn(STEPS, BATCH, DIM, generator=g)
    times: dict[str, list[float]] = {name: [] for name in steps}
    batches = [(normalize(memory[i] + 0.05 * e), label[i], i) for i, e in zip(index, noise, strict=True)]
    for turn in range(0, STEPS, TURN):
        for name, step in steps.items():
            times[name] += [_cpu_ms(step, *batch) for batch in batches[turn : turn + TURN]][WARM:]
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"\nmemory {memory_size}, classes {num_classes}, batch {BATCH}, D {DIM}; goal: {goal}x official style"
    )
    print(f"{'':24s}{'median ms':>10s}{'best ms':>10s}{'of ours':>10s}")
    for name, values in times.items():
        print(f"{name:24s}{median[name]:10.2f}{min(values):10.2f}{median[name] / median['ours']:9.1f}x")
    assert filter.count == memory_size
    assert median["ours"] < min(median["official style"], median["XBM + centres"])
