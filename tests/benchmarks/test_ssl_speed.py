"""Time and memory of the self-supervised losses beside plain torch, in the same run.

Run: ``OMP_NUM_THREADS=1 pytest tests/benchmarks/test_ssl_speed.py -m benchmark -s``. Medians of process CPU
time on one thread, ours and plain in turns so that other work on the machine hits both alike; on a GPU wall
time between synchronisations. Memory is the peak during one call above that before it.
"""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import MoCHiLoss, NTXentLoss, sinkhorn
from lightning_nrml.memory import FeatureQueue
from lightning_nrml.modules import SimCLR
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig

pytestmark = pytest.mark.benchmark
DIM = 128
HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # a private name; bool() is False
Call = Callable[[], object]


def seconds(call: Call, device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def megabytes(call: Call, device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(1e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return (peak - before) / 1e6


def compare(title: str, ours: Call, plain: Call, device: str, repeats: int) -> float:
    """Print both and return the ratio of the medians."""
    memory = [megabytes(ours, device), megabytes(plain, device)]
    times = [(seconds(ours, device), seconds(plain, device)) for _ in range(repeats)]
    own, peer = (statistics.median(t) for t in zip(*times, strict=True))
    print(
        f"\n{device} {title}: ours {own * 1e3:.1f} ms, {memory[0]:.0f} MB; plain torch {peer * 1e3:.1f} ms, "
        f"{memory[1]:.0f} MB; ratio {own / peer:.2f}"
    )
    return own / peer


def plain_ntxent(a: Tensor, b: Tensor, t: float) -> Tensor:
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / t).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


@pytest.mark.parametrize(("n", "repeats", "goal"), [(256, 40, 1.0), (1024, 9, 1.0), (4096, 3, 1.0)])
def test_ntxent(device, n, repeats, goal):
    a, b = torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(0)).to(device)
    a.requires_grad_()
    b.requires_grad_()
    loss = NTXentLoss(0.5)
    ours = lambda: torch.autograd.grad(loss(a, b), (a, b))  # noqa: E731
    plain = lambda: torch.autograd.grad(plain_ntxent(a, b, 0.5), (a, b))  # noqa: E731
    for x, y in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-7)
    assert compare(f"NT-Xent N={n} D={DIM}, forward and backward", ours, plain, device, repeats) < goal
    if n == 4096 and device == "cpu":
        assert megabytes(ours, device) < 120


def plain_mochi(
    q: Tensor, k: Tensor, queue: Tensor, t: float, hard: int, mixed: int, query_mixed: int
) -> Tensor:
    """Build every synthetic row."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    negative = q @ queue.T
    row = negative.detach().topk(hard).indices

    def pick(num: int) -> Tensor:
        return queue[row.gather(1, torch.randint(hard, (len(q), num), device=q.device))]

    a = torch.rand(len(q), mixed, 1, device=q.device)
    h = F.normalize(a * pick(mixed) + (1 - a) * pick(mixed), dim=2)
    b = torch.rand(len(q), query_mixed, 1, device=q.device) / 2
    g = F.normalize(b * q.detach()[:, None] + (1 - b) * pick(query_mixed), dim=2)
    synthetic = [torch.einsum("bd,bsd->bs", q, x) for x in (h, g)]
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), negative, *synthetic], dim=1) / t
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


@pytest.mark.parametrize(("size", "repeats", "goal"), [(16384, 5, 0.35), (65536, 3, 0.55)])
def test_mochi(device, size, repeats, goal):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 256, DIM, generator=g).to(device)
    q.requires_grad_()
    queue = F.normalize(torch.randn(size, DIM, generator=g), dim=1).to(device)
    loss, moco = MoCHiLoss(0.2, 1024, 1024, 128), MoCHiLoss(0.2)
    ours = lambda: torch.autograd.grad(loss(q, k, queue), q)  # noqa: E731
    plain = lambda: torch.autograd.grad(plain_mochi(q, k, queue, 0.2, 1024, 1024, 128), q)  # noqa: E731
    torch.testing.assert_close(ours()[0], plain()[0], rtol=0.05, atol=2e-4)  # the draws differ
    title = f"MoCHi(1024, 1024, 128), batch 256, queue {size}, forward and backward"
    ratio = compare(title, ours, plain, device, repeats)
    alone = statistics.median(
        seconds(lambda: torch.autograd.grad(moco(q, k, queue), q), device) for _ in "12345"
    )
    print(f"  our MoCo loss without mixing: {alone * 1e3:.1f} ms")
    assert device == "cuda" or ratio < goal


def plain_sinkhorn(scores: Tensor) -> Tensor:
    q = (scores / 0.05).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * q.shape[0]
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def test_sinkhorn(device):
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(1024, DIM, generator=g), dim=1)
    scores = (z @ F.normalize(torch.randn(3000, DIM, generator=g), dim=1).T).to(device)
    torch.testing.assert_close(sinkhorn(scores), plain_sinkhorn(scores), rtol=1e-3, atol=1e-8)
    compare(
        "Sinkhorn 1024 x 3000, 3 iterations",
        lambda: sinkhorn(scores),
        lambda: plain_sinkhorn(scores),
        device,
        21,
    )


class ByHand(L.Callback):
    """After each step of the trainer, takes the same step in a plain loop; times both."""

    def __init__(self, module: SimCLR, batches: list[dict[str, object]]) -> None:
        self.net = torch.nn.Sequential(copy.deepcopy(module.backbone), copy.deepcopy(module.projector))
        self.batches, self.times = batches, ([], [])
        self.start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = pl_module.device
        self.net.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, len(self.batches))
        self.start = self.now()

    def now(self) -> float:
        if next(self.net.parameters()).is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        begin = self.now()
        self.times[0].append(begin - self.start)
        views = torch.cat(batch["views"]).contiguous(memory_format=torch.channels_last)
        loss = plain_ntxent(*self.net(views).chunk(2), 0.2)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.start = self.now()
        self.times[1].append(self.start - begin)


def test_simclr_step(device, tmp_path):
    """A step of the whole trainer beside a plain loop over the same net, batches and layout."""
    g = torch.Generator().manual_seed(0)
    n, steps = 128, 24
    batches = [
        {
            "image": torch.zeros(n, 1),
            "views": [torch.randn(n, 3, 48, 48, generator=g) for _ in "ab"],
            "label": torch.zeros(n, dtype=torch.int64),
            "index": torch.arange(n),
        }
        for _ in range(steps)
    ]
    kwargs = {"input_size": 48, "widths": [32, 64, 128, 128]}
    module = SimCLR(
        "conv4", kwargs, temperature=0.2, projector_dim=64, channels_last=True,
        optimizer=OptimizerConfig("adam", 1e-3, 1e-4), schedule=ScheduleConfig("cosine", 0),
    )  # fmt: skip
    watch = ByHand(module, batches)
    L.Trainer(
        max_epochs=1, accelerator=device, devices=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[watch],
    ).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # fmt: skip
    ours, plain = (statistics.median(t[4:]) for t in watch.times)
    print(
        f"\n{device} SimCLR step, batch {n}, 48 px: {ours * 1e3:.1f} ms; plain loop {plain * 1e3:.1f} ms; "
        f"ratio {ours / plain:.3f}"
    )
    assert ours / plain < 1.05


class Watch(L.Callback):
    """Process seconds from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.ends.append(time.process_time())


@pytest.mark.skipif(
    not getattr(torch.cpu, "_is_amx_tile_supported", bool)(), reason="this CPU multiplies bfloat16 no faster"
)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_bf16_on_a_cpu(stem):
    """``precision: bf16-mixed`` and ``channels_last: true`` on a CPU with AMX, beside the defaults."""
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(128)
    views = [torch.randn(128, 3, 32, 32, generator=g) for _ in "ab"]
    batch = {"image": torch.zeros(128, 1), "views": views, "label": rows * 0, "index": rows}
    found = {}
    for precision, channels_last in (("32-true", False), ("32-true", True), ("bf16-mixed", True)):
        module = SimCLR(
            "resnet18", stem=stem, channels_last=channels_last, projector_dim=128,
            optimizer=OptimizerConfig("sgd", 0.1), schedule=ScheduleConfig("cosine", 0),
        )  # fmt: skip
        watch = Watch()
        L.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, callbacks=[watch], precision=precision,
        ).fit(module, torch.utils.data.DataLoader([batch] * 6, batch_size=None))  # fmt: skip
        steps = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)]
        found[precision, channels_last] = statistics.median(steps)
    plain = found["32-true", False]
    print(f"\nSimCLR step, resnet18, {stem} stem, 2 x 128 of 32 px:")
    for (precision, channels_last), seconds_each in found.items():
        layout = "channels last" if channels_last else "default layout"
        print(f"  {precision:11s}{layout:15s}{seconds_each:6.2f} s   {plain / seconds_each:.2f}x")
    if stem == "cifar":  # with the other stem the layers are too small for it to matter
        assert found["bf16-mixed", True] < found["32-true", True]


def test_enqueue_does_not_depend_on_the_size(device):
    z = F.normalize(torch.randn(256, DIM), dim=1).to(device)
    queues = [FeatureQueue(size, DIM, with_label=False).to(device) for size in (4096, 65536)]
    for _ in range(20):  # touch all pages
        queues[0].enqueue(z)
    for _ in range(300):
        queues[1].enqueue(z)
    times = [[seconds(lambda q=q: q.enqueue(z), device) for q in queues] for _ in range(300)]
    small, large = (statistics.median(t) for t in zip(*times, strict=True))
    print(f"\n{device} enqueue 256 rows: into 4,096 {small * 1e6:.0f} us, into 65,536 {large * 1e6:.0f} us")
    assert large < 2 * small
