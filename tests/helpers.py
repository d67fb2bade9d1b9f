"""Small runs on scikit-learn's digits, shared by the tests of modules and callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_nrml.data import DigitsDataModule, NoiseConfig
from lightning_nrml.modules import MetricLearning
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig


def digits(**kwargs: Any) -> DigitsDataModule:
    """Half of the labels wrong; 8 batches an epoch."""
    options: dict[str, Any] = {
        "batch_size": 32,
        "m_per_class": 4,
        "noise": NoiseConfig("symmetric", 0.5, 1),
        "epoch_length": 256,
    }
    return DigitsDataModule(**{**options, **kwargs})


def module(**kwargs: Any) -> MetricLearning:
    """A tiny net with a cross-batch memory; equal weights for equal arguments."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "backbone": "conv4",
        "backbone_kwargs": {"input_size": 8, "widths": [8, 16], "strides": [1, 2]},
        "in_channels": 1,
        "embedding_dim": 16,
        "memory_size": 100,
        "memory_weight": 0.1,
        "optimizer": OptimizerConfig("adam", 2e-3),
        "schedule": ScheduleConfig("cosine", 4),
    }
    return MetricLearning(**{**options, **kwargs})


def trainer(folder: Path, epochs: int = 2, callbacks: Any = (), **kwargs: Any) -> L.Trainer:
    """A silent CPU trainer; ``last.ckpt`` is written after every epoch if a checkpoint callback is given."""
    L.seed_everything(7, verbose=False)
    options: dict[str, Any] = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": str(folder),
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**options, **kwargs})


def state_of(pl_module: L.LightningModule) -> dict[str, torch.Tensor]:
    """A copy of everything that training changes."""
    return {k: v.detach().clone() for k, v in pl_module.state_dict().items()}


def assert_same_state(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Bit-equal, NaN included."""
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert value.dtype == two[key].dtype, key
        same = torch.equal(value, two[key])
        if not same and value.is_floating_point():
            same = torch.equal(torch.nan_to_num(value, nan=9e9), torch.nan_to_num(two[key], nan=9e9))
        assert same, f"{key} differs"
