"""The run card: what is about to happen, on one screen, before the first batch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table


class RunCard(Callback):
    """Prints method, backbone, dataset and noise, batch and steps, filters and places at start of fit.

    Args:
        show: ``False`` prints nothing.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print on rank 0, once everything is attached and the number of steps is known."""
        if not self.show or not trainer.is_global_zero:
            return
        grid = Table.grid(padding=(0, 2))
        for name, text in card(trainer, pl_module).items():
            grid.add_row(f"[bold]{name}[/bold]", text.replace("[", r"\["))
        Console().print(Panel(grid, title="run card", title_align="left", expand=False))


def card(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    """The rows of the card; what a module or datamodule does not tell is left out."""
    data: Any = getattr(trainer, "datamodule", None)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    rows = {
        "method": f"{type(module).__name__}, {readable(trainable)} trainable parameters",
        "backbone": _backbone(module),
        "data": _data(data),
        "noise": _noise(data),
        "batch": _batch(trainer),
        "steps": _steps(trainer),
        "filters": _filters(module),
        "device": _device(trainer),
        "changed": getattr(trainer, "changed", ""),
        "outputs": trainer.default_root_dir,
        "resume": _resume(trainer),
    }
    return {name: text for name, text in rows.items() if text}


def readable(number: int) -> str:
    """``3000 -> "3 k"``, from 100,000 on in millions."""
    if number < 1_000:
        return str(number)
    return f"{number / 1e3:.3g} k" if number < 100_000 else f"{number / 1e6:.2f} M"


def _backbone(module: LightningModule) -> str:
    backbone = getattr(module, "backbone", None)
    if backbone is None:
        return ""
    cfg = getattr(backbone, "default_cfg", None) or {}
    name = cfg.get("architecture") or type(backbone).__name__
    dim = getattr(module, "embedding_dim", None)
    return f"{name}, embedding of {dim} numbers" if dim else str(name)


def _data(data: Any) -> str:
    parts = [type(data).__name__] if data is not None else []
    if (samples := getattr(data, "num_train_samples", None)) is not None:
        parts.append(f"{samples} training samples")
    if (classes := getattr(data, "num_classes", None)) is not None:
        parts.append(f"{classes} classes")
    return ", ".join(parts)


def _noise(data: Any) -> str:
    """Kind and asked-for rate, and the rate that came out on the training labels."""
    noise = getattr(data, "noise", None)
    if data is None or noise is None:
        return ""
    kind = getattr(noise, "kind", None)
    if table := getattr(noise, "table", None) if kind else noise:
        text = f"label table {table}"
    else:
        text = "none injected" if kind == "none" else f"{kind}, rate {noise.rate:g}, seed {noise.seed}"
    flags = getattr(data, "train_is_noise", None)
    keep = getattr(data.splits.train, "keep", None) if hasattr(data, "splits") else None
    if keep is not None:
        text += f", which leaves out {int((~torch.as_tensor(keep)).sum())} samples"
    if flags is not None:
        flags = torch.as_tensor(flags)
        flags = flags if keep is None else flags[torch.as_tensor(keep)]
        text += f"; realised {float(flags.float().mean()):.1%} wrong labels"
    elif (changed := getattr(data, "num_changed_labels", None)) is not None:
        text += f"; {changed} of {data.train_label.numel()} labels differ from the data set's own"
    return text


def _batch(trainer: Trainer) -> str:
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    if not size:
        return ""
    world, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    text = f"{size * world * accumulate} global"
    if world > 1 or accumulate > 1:
        text += f" = {size} x {world} ranks x {accumulate} accumulated"
    return text


def _steps(trainer: Trainer) -> str:
    steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    text = f"{steps:g} optimiser steps" if steps != float("inf") else "unlimited"
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        text += f" = {trainer.max_epochs} epochs x {batches} batches"
    if trainer.global_step:
        text += f"; continued from step {trainer.global_step} (epoch {trainer.current_epoch})"
    return text


def _filters(module: LightningModule) -> str:
    chain = getattr(module, "filters", None)
    modes = getattr(chain, "mode", {})
    names = [f"{name} ({modes[name]})" if name in modes else name for name in getattr(chain, "keys", list)()]
    return ", ".join(names) or "none: every label is trusted"


def _device(trainer: Trainer) -> str:
    kind = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    return f"{trainer.world_size} x {kind}, precision {trainer.precision}"


def _resume(trainer: Trainer) -> str:
    folder = Path(trainer.default_root_dir)
    if not trainer.checkpoint_callbacks or getattr(trainer, "fast_dev_run", False):
        return "no checkpoints are written"
    return f"nrml fit --config {shlex.quote(str(folder / 'config.yaml'))} --ckpt_path last"
