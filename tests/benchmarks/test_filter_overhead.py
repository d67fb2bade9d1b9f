"""What a filter adds to a training step, in percent of the step.

Run: ``OMP_NUM_THREADS=1 pytest tests/benchmarks/test_filter_overhead.py -m benchmark -s``.

The step is forward, backward and Adam of a ResNet-18 (timm, stem for small images) with cosine softmax, on
batches of 64 images of 3 x 32 x 32. The filter's share is ``select`` and ``update`` on the gathered
embeddings and logits, for a training set of 60,000 samples with full memories. Small images make the step
cheap, so the share is at most as large as with images of the usual size. Process CPU time on one thread;
steps of the net and of the filters in turns, so that other work on the machine hits all alike; ratios are of
medians. The callback's own bookkeeping (ledger, logging) is in the row "ledger".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from lightning_nrml.filters import BARE, PRISM, Consensus, NoiseFilter
from lightning_nrml.losses import CosineSoftmaxLoss
from lightning_nrml.memory import SampleLedger
from lightning_nrml.models import create_backbone
from lightning_nrml.types import FilterContext, Selection

SAMPLES, BATCH, DIM, ROUNDS, TURN = 60_000, 64, 128, 4, 5


def net_step(num_classes: int) -> Callable[[], None]:
    """One optimiser step of the net."""
    backbone, features = create_backbone("resnet18", stem="cifar")
    head, loss = torch.nn.Linear(features, DIM), CosineSoftmaxLoss(num_classes, DIM)
    parameters = [p for part in (backbone, head, loss) for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-3)
    image, label = torch.rand(BATCH, 3, 32, 32), torch.randint(num_classes, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        loss(head(backbone(image)), label).backward()
        optimizer.step()

    return step


def filter_steps(num_classes: int) -> dict[str, Callable[[], None]]:
    """``select`` and ``update`` of each filter, memories full."""
    g = torch.Generator().manual_seed(0)
    label = torch.arange(SAMPLES) % num_classes
    rows = normalize(
        torch.randn(num_classes, DIM, generator=g)[label] + torch.randn(SAMPLES, DIM, generator=g)
    )
    proxies = torch.randn(num_classes, DIM, generator=g)
    found: dict[str, NoiseFilter] = {
        "PRISM AvgSim": PRISM(num_classes, DIM, memory_size=SAMPLES),
        "PRISM vMF-Sim": PRISM(num_classes, DIM, memory_size=SAMPLES, similarity="vmf", shared_kappa=True),
        "BARE": BARE(),
        "Consensus": Consensus(num_classes, DIM, SAMPLES, warmup_steps=0),
    }
    ledger = SampleLedger(SAMPLES)

    def context(index: torch.Tensor) -> FilterContext:
        return FilterContext(rows[index], label[index], index, logits=16 * rows[index] @ proxies.T)

    def make(part: NoiseFilter) -> Callable[[], None]:
        for index in torch.arange(SAMPLES).split(4096):
            part.update(context(index), Selection.keep_all(label[index]))

        def step() -> None:
            part.update(ctx, part.select(ctx))

        ctx = context(torch.randint(SAMPLES, (BATCH,), generator=g))
        return step

    index = torch.randint(SAMPLES, (BATCH,), generator=g)
    keep = Selection.keep_all(label[index])
    steps = {name: make(part) for name, part in found.items()}
    return {**steps, "ledger": lambda: ledger.record(index, keep.weight, keep.score, None)}


@pytest.mark.benchmark
@pytest.mark.parametrize("num_classes", [100, 1_000])
def test_share_of_the_step(num_classes):
    steps = {"net": net_step(num_classes), **filter_steps(num_classes)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            for _ in range(1 if name == "net" else TURN):
                start = time.process_time()
                step()
                times[name].append(1e3 * (time.process_time() - start))
    net = statistics.median(times["net"])
    print(f"\nResNet-18, batch {BATCH} of 3 x 32 x 32, {num_classes} classes, {SAMPLES} samples; goal: 3 %")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:16s}{median:10.2f} ms{100 * median / net:8.2f} %")
    assert statistics.median(times["BARE"]) < net
