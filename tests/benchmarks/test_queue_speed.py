"""Time of an enqueue and of the memory loss, beside pytorch-metric-learning. Run: -m benchmark -s."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss as PeerLoss
from pytorch_metric_learning.losses import CrossBatchMemory

from lightning_nrml.losses import CrossBatchContrastiveLoss
from lightning_nrml.memory import FeatureQueue

pytestmark = pytest.mark.benchmark
DIM, ROWS = 128, 256


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Lower decile of the time of a call after a warm-up: other work on the machine only adds."""
    times = []
    for step in range(repeats + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if step >= 3:
            times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=10)[0]


def test_enqueue(device):
    z = torch.randn(ROWS, DIM, device=device)
    label = torch.arange(ROWS, device=device)
    keep = torch.ones(ROWS, device=device)
    keep[::3] = 0
    for size in (16384, 65536):
        ours = FeatureQueue(size, DIM).to(device)
        peer = CrossBatchMemory(PeerLoss(), DIM, size)
        peer.embedding_memory, peer.label_memory = (
            peer.embedding_memory.to(device),
            peer.label_memory.to(device),
        )
        for name, call in (
            ("ours", lambda q=ours: q.enqueue(z, label, label)),
            ("ours, a third dropped", lambda q=ours: q.enqueue(z, label, label, keep=keep)),
            ("PML CrossBatchMemory", lambda q=peer: q.add_to_memory(z, label, ROWS)),
        ):
            print(
                f"{device} enqueue {ROWS} x {DIM} into {size}: {name} "
                f"{seconds(call, device, 300) * 1e6:.0f} us"
            )
        assert len(ours) == size


@pytest.mark.parametrize("memory", [20_000, 60_000])
def test_memory_loss(device, memory):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(128, DIM, generator=generator).to(device).requires_grad_()
    label = (torch.arange(128) % 32).to(device)
    rows = torch.randn(memory, DIM, generator=generator).to(device)
    row_label = (torch.arange(memory) % 1000).to(device)
    loss = CrossBatchContrastiveLoss()

    def plain() -> torch.Tensor:
        """The formula with one temporary after the other."""
        unit = torch.nn.functional.normalize
        s = unit(z) @ unit(rows).T
        same = label[:, None] == row_label[None, :]
        pairs = (1 - s) * (same & (s < 1 - 1e-5)) + s * (~same & (s > 0.5))
        return pairs.sum() / len(z)

    torch.testing.assert_close(loss(z, label, rows, row_label), plain(), rtol=1e-4, atol=1e-4)
    for name, call in (
        ("ours", lambda: loss(z, label, rows, row_label).backward()),
        ("plain autograd", lambda: plain().backward()),
    ):
        took = seconds(call, device, 15)
        extra = ""
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            extra = f", {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MB"
        print(f"{device} memory loss 128 x {memory}: {name} {took * 1e3:.2f} ms{extra}")
