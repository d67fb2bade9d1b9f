"""Tiny self-supervised runs on digits, shared by the tests of these methods."""

from __future__ import annotations

from typing import Any

import torch

from lightning_nrml import modules
from lightning_nrml.data import DigitsDataModule
from lightning_nrml.data.views import MultiCropViews, SimCLRViews
from lightning_nrml.modules.self_supervised import SelfSupervised
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig

METHODS: dict[str, dict[str, Any]] = {
    "SimCLR": {"projector_dim": 16},
    "MoCo": {"projector_dim": 16, "queue_size": 100, "tau": 0.9},
    "BYOL": {"projector_dim": 16, "projector_hidden": 32, "tau": 0.9},
    "SwAV": {
        "projector_dim": 16, "projector_hidden": 32, "num_prototypes": 20,
        "queue_size": 64, "queue_start_epoch": 1,
    },
    "MoCHi": {
        "projector_dim": 16, "queue_size": 100, "tau": 0.9,
        "num_hard": 20, "num_mixed": 8, "num_query_mixed": 4, "warmup_epochs": 1,
    },
}  # fmt: skip


def crops(size: int = 8, **kwargs: Any) -> SimCLRViews:
    """Views that change digits without making other digits of them."""
    options = {"crop_scale": (0.3, 1.0), "flip": 0.0, "strength": 0.5, "grayscale": 0.0, "blur": 0.0}
    return SimCLRViews(size, **{**options, "interpolation": "bilinear", **kwargs})


def digits(method: str, **kwargs: Any) -> DigitsDataModule:
    """Digits without label noise, with the views of a method."""
    view: Any = crops()
    if method == "SwAV":
        view = MultiCropViews(8, 2, 8, 2, (0.3, 1.0), (0.2, 0.4), flip=0, grayscale=0, blur=0)
    return DigitsDataModule(**{"batch_size": 64, "train_view": view, **kwargs})


class PooledNet(torch.nn.Module):
    """Convolutions, batch norm and mean pooling: takes crops of any size."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean(dim=(2, 3))


def module(method: str, **kwargs: Any) -> SelfSupervised:
    """A tiny net; equal weights for equal arguments."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "backbone": "conv4",
        "backbone_kwargs": {"input_size": 8, "widths": [8, 16], "strides": [2, 2]},
        "in_channels": 1,
        "optimizer": OptimizerConfig("adam", 2e-3),
        "schedule": ScheduleConfig("cosine", 0.1),
        **METHODS[method],
    }
    cls = getattr(modules, method)
    return cls(**{**options, **kwargs})
