"""The plain training loop in which a peer takes everything but its method from a recipe of ours."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from lightning_nrml.data import NRMLDataModule
from lightning_nrml.data.views import ViewKey
from lightning_nrml.modules import EmbeddingModule
from lightning_nrml.optim import create_optimizer, create_schedule


class Loop:
    """Batches, views, optimiser and schedule are the recipe's, and the random numbers those of a run of ours.

    Args:
        data: what the recipe builds.
        ours: the recipe's module, for its settings.
        net: the peer, a module with ``loss(batch, views, epoch, step, steps)``, whose loss may be ``(1,)``,
            and, if it has memories to write, ``after_step()``.
        epochs: of the run.
    """

    def __init__(self, data: NRMLDataModule, ours: EmbeddingModule, net: Any, epochs: int) -> None:
        self.data, self.net = data, net.train()
        self.dtype = next(net.parameters()).dtype
        self.layout = torch.channels_last if ours.channels_last else torch.preserve_format
        if ours.channels_last:
            net.to(memory_format=torch.channels_last)
        self.loader = self.data.train_dataloader()
        self.epochs, self.steps, self.done = epochs, epochs * len(self.loader), 0
        self.optimizer = create_optimizer(ours.optimizer_config, net)
        self.schedule = create_schedule(ours.schedule_config, self.optimizer, self.steps)

    def batches(self, epoch: int) -> list[dict[str, Any]]:
        """The batches of an epoch, images not yet augmented, in the order of a run of ours."""
        self.data.train_sampler.set_epoch(epoch)
        return list(self.loader)

    def views(self, batch: dict[str, Any], epoch: int, number: int) -> list[Tensor]:
        """The views of a batch, with the random numbers of a run of ours."""
        image = batch["image"]
        view = self.data._view("train", image.device)
        made = view(image, ViewKey(self.data.seed, epoch, number))
        return [v.to(dtype=self.dtype, memory_format=self.layout) for v in made]

    def step(self, batch: dict[str, Any], views: list[Tensor], epoch: int) -> float:
        """One optimiser step; returns the loss."""
        loss = self.net.loss(batch, views, epoch, self.done, self.steps).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}, step {self.done}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        if hasattr(self.net, "after_step"):
            self.net.after_step()
        return float(loss.detach())

    def run(self) -> None:
        """All epochs."""
        for epoch in range(self.epochs):
            batches = enumerate(self.batches(epoch))
            losses = [self.step(batch, self.views(batch, epoch, i), epoch) for i, batch in batches]
            print(f"epoch {epoch} loss {statistics.fmean(losses):.4f}", flush=True)
