"""Noise-Robust Metric Learning for PyTorch Lightning.

Names are imported on first use: ``import lightning_nrml`` alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_nrml.callbacks.noise_filter import NoiseFilterCallback
    from lightning_nrml.cli.app import NRMLCLI
    from lightning_nrml.data.base import NRMLDataModule
    from lightning_nrml.filters.base import NoiseFilter
    from lightning_nrml.filters.chain import select
    from lightning_nrml.modules.base import EmbeddingModule
    from lightning_nrml.modules.byol import BYOL
    from lightning_nrml.modules.insclr import InsCLR
    from lightning_nrml.modules.linear_probe import LinearProbe
    from lightning_nrml.modules.metric_learning import MetricLearning
    from lightning_nrml.modules.mochi import MoCHi
    from lightning_nrml.modules.moco import MoCo
    from lightning_nrml.modules.simclr import SimCLR
    from lightning_nrml.modules.swav import SwAV
    from lightning_nrml.types import Batch, FilterContext, Selection, StepOutput

__version__ = "0.1.0"

_HOME = {
    "BYOL": "modules.byol",
    "Batch": "types",
    "EmbeddingModule": "modules.base",
    "FilterContext": "types",
    "InsCLR": "modules.insclr",
    "LinearProbe": "modules.linear_probe",
    "MetricLearning": "modules.metric_learning",
    "MoCHi": "modules.mochi",
    "MoCo": "modules.moco",
    "NRMLCLI": "cli.app",
    "NRMLDataModule": "data.base",
    "NoiseFilter": "filters.base",
    "NoiseFilterCallback": "callbacks.noise_filter",
    "Selection": "types",
    "SimCLR": "modules.simclr",
    "StepOutput": "types",
    "SwAV": "modules.swav",
    "select": "filters.chain",
}
_ROOMS = (
    "audit",
    "callbacks",
    "data",
    "filters",
    "losses",
    "memory",
    "metrics",
    "models",
    "modules",
    "optim",
)

__all__ = [
    "BYOL",
    "Batch",
    "EmbeddingModule",
    "FilterContext",
    "InsCLR",
    "LinearProbe",
    "MetricLearning",
    "MoCHi",
    "MoCo",
    "NRMLCLI",
    "NRMLDataModule",
    "NoiseFilter",
    "NoiseFilterCallback",
    "Selection",
    "SimCLR",
    "StepOutput",
    "SwAV",
    "__version__",
    "select",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
