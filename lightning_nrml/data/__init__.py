"""Data sets, label noise, samplers and views.

Names are imported on first use, so that ``lightning_nrml.data.noise`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_nrml.data.base import NRMLDataModule
    from lightning_nrml.data.dataset import IndexedDataset, Split, Splits
    from lightning_nrml.data.digits import DigitsDataModule
    from lightning_nrml.data.noise import NoiseConfig, NoisyLabels

_HOME = {
    "DigitsDataModule": "digits",
    "IndexedDataset": "dataset",
    "NRMLDataModule": "base",
    "NoiseConfig": "noise",
    "NoisyLabels": "noise",
    "Split": "dataset",
    "Splits": "dataset",
}

__all__ = [
    "DigitsDataModule",
    "IndexedDataset",
    "NRMLDataModule",
    "NoiseConfig",
    "NoisyLabels",
    "Split",
    "Splits",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
