"""Images per second of SimCLR training as a whole: JPEG files, two views, net, loss, optimiser.

Run: ``OMP_NUM_THREADS=1 pytest tests/benchmarks/test_pipeline_speed.py -m benchmark -s``.

Ours is what ``nrml fit`` runs: datamodule, views on the device, trainer. The peers are lightly's transform,
head and loss, and solo-learn's style (torchvision on PIL images, one at a time), each in a plain loop
without a trainer. Same files, net, batch, crops, optimiser and layout. On a CPU process time on one thread,
the files read by the process itself; on a GPU wall time, bf16, with as many workers as cores. Epochs in
turns, so that other work on the machine hits all alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lightning_nrml.data import FolderDataModule
from lightning_nrml.data.views import SimCLRViews, ViewKey
from lightning_nrml.modules import SimCLR
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig

pytestmark = pytest.mark.benchmark
BATCH, SOURCE, SIZE, TURNS = 128, 96, 64, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETS = {
    "conv4": {"input_size": SIZE, "widths": [32, 64, 128, 128]},
    "resnet18": {},
}


def write_images(root: Path, count: int) -> None:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=g)
    smooth = F.interpolate(coarse, (SOURCE, SOURCE), mode="bicubic")
    pixels = smooth.add(torch.randn(smooth.shape, generator=g), alpha=0.05).clamp(0, 1).mul(255).byte()
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        folder = root / "train" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.jpg", quality=90)


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def our_module(net: str) -> SimCLR:
    return SimCLR(
        net, dict(NETS[net]), temperature=0.2, projector_dim=128, channels_last=True,
        optimizer=OptimizerConfig("adam", 1e-3, 1e-4), schedule=ScheduleConfig("cosine", 0),
    )  # fmt: skip


def our_data(root: Path, device: str, workers: int) -> FolderDataModule:
    return FolderDataModule(
        str(root), image_size=SOURCE, batch_size=BATCH, num_workers=workers,
        pin_memory=device == "cuda", train_view=SimCLRViews(SIZE, mean=MEAN, std=STD),
    )  # fmt: skip


class Watch(L.Callback):
    """Starts the peers' epochs after each of ours."""

    def __init__(self, device: str, between: Callable[[], None]) -> None:
        self.device, self.between, self.seconds = device, between, []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = now(self.device)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(now(self.device) - self.start)
        self.between()


class PeerLoop:
    """A plain training loop over files; ``criterion`` takes both projections."""

    def __init__(
        self, root: Path, transform: Any, head: nn.Module, criterion: Any, net: str, device: str, workers: int
    ) -> None:
        files = ImageFolder(str(root / "train"), transform)
        self.loader = DataLoader(
            files, BATCH, shuffle=True, drop_last=True, num_workers=workers,
            pin_memory=device == "cuda", persistent_workers=workers > 0,
        )  # fmt: skip
        self.net = nn.Sequential(our_module(net).backbone, head).train()
        self.net.to(device, memory_format=torch.channels_last)
        self.criterion, self.device, self.seconds, self.loading = criterion, device, [], []
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3, weight_decay=1e-4)

    def epoch(self) -> None:
        start = now(self.device)
        for views, _ in self.loader:
            x = torch.cat([v.to(self.device, non_blocking=True) for v in views])
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                z = self.net(x)
            loss = self.criterion(*z.float().chunk(2))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.seconds.append(now(self.device) - start)
        if not self.loader.num_workers:
            start = now(self.device)
            for _ in self.loader:
                pass
            self.loading.append(now(self.device) - start)


class TwoCrops:
    """solo-learn's style: the same torchvision transform twice."""

    def __init__(self) -> None:
        self.view = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, (0.08, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
                transforms.RandomGrayscale(0.2),
                transforms.RandomApply([transforms.GaussianBlur(SIZE // 10 // 2 * 2 + 1, (0.1, 2.0))], 0.5),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self.view(image), self.view(image)]


def plain_ntxent(a: Tensor, b: Tensor) -> Tensor:
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


@pytest.mark.parametrize("net", list(NETS))
def test_images_per_second_of_training(net, device, tmp_path):
    loss, heads, lightly_transform = (
        pytest.importorskip(f"lightly.{name}", reason="lightly comes with the extra 'dev'")
        for name in ("loss", "models.modules.heads", "transforms")
    )
    count = BATCH * (4 if device == "cpu" else 80)
    workers = 0 if device == "cpu" else os.cpu_count() or 1
    write_images(tmp_path, count)
    module = our_module(net)
    width = module.num_features

    def head() -> nn.Module:
        return heads.SimCLRProjectionHead(width, width, 128)

    transform = lightly_transform.SimCLRTransform(
        SIZE, cj_prob=0.8, cj_bright=0.8, cj_contrast=0.8, cj_sat=0.8, cj_hue=0.2, gaussian_blur=0.5
    )
    peers = {
        "lightly": PeerLoop(tmp_path, transform, head(), loss.NTXentLoss(0.2), net, device, workers),
        "solo-learn style": PeerLoop(tmp_path, TwoCrops(), head(), plain_ntxent, net, device, workers),
    }
    watch = Watch(device, lambda: [peer.epoch() for peer in peers.values()])
    L.Trainer(
        max_epochs=TURNS, accelerator=device, devices=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[watch], num_sanity_val_steps=0,
        limit_val_batches=0, use_distributed_sampler=False,
        precision="bf16-mixed" if device == "cuda" else "32-true",
    ).fit(module, datamodule=our_data(tmp_path, device, workers))  # fmt: skip
    seconds = {"ours": watch.seconds[1:], **{name: peer.seconds[1:] for name, peer in peers.items()}}
    rate = {name: count / statistics.median(values) for name, values in seconds.items()}
    print(f"\n{device}, {net}, {SOURCE} -> 2 x {SIZE} px, batch {BATCH}: images/s")
    for name, value in rate.items():
        print(f"  {name:18s}{value:8.0f}   ours / this {rate['ours'] / value:.2f}")
    print("  of an epoch of ours: " + where_it_goes(our_data(tmp_path, device, workers), watch, device))
    for name, peer in peers.items():
        if peer.loading:
            share = statistics.median(peer.loading) / statistics.median(peer.seconds)
            print(f"  of an epoch of {name}: reading and views {share:.0%}")
    assert rate["ours"] > max(rate["lightly"], rate["solo-learn style"])


def where_it_goes(data: FolderDataModule, watch: Watch, device: str) -> str:
    """Shares of reading and of the views, measured alone; the rest is net, loss, optimiser and trainer."""
    data.setup("fit")
    loader = data.train_dataloader()
    start = now(device)
    batches = [batch["image"] for batch in loader]
    reading = now(device) - start
    images = [image.to(device) for image in batches]
    start = now(device)
    for i, image in enumerate(images):
        data._view("train", image.device)(image, ViewKey(0, 0, i))
    views = now(device) - start
    whole = statistics.median(watch.seconds[1:])
    return f"reading {reading / whole:.0%}, views {views / whole:.0%}"
