"""Data sets, label noise, samplers and views.

Names are imported on first use, so that ``lightning_nrml.data.noise`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_nrml.data.array import ArrayDataModule
    from lightning_nrml.data.base import NRMLDataModule
    from lightning_nrml.data.bigearthnet import BigEarthNetDataModule
    from lightning_nrml.data.cifar import CIFARDataModule, CIFARNDataModule
    from lightning_nrml.data.dataset import IndexedDataset
    from lightning_nrml.data.deepglobe import DeepGlobeDataModule
    from lightning_nrml.data.digits import DigitsDataModule
    from lightning_nrml.data.dml_benchmarks import CarsDataModule, CUBDataModule, SOPDataModule
    from lightning_nrml.data.eurosat import EuroSATDataModule
    from lightning_nrml.data.folder import FolderDataModule
    from lightning_nrml.data.multilabel_rs import MultiLabelRSDataModule
    from lightning_nrml.data.noise import NoiseConfig, NoisyLabels
    from lightning_nrml.data.omniglot import OmniglotDataModule
    from lightning_nrml.data.samplers import (
        MPerClassSampler,
        NeighbourSampler,
        ShuffleSampler,
        UnpaddedSampler,
    )
    from lightning_nrml.data.splits import Split, Splits
    from lightning_nrml.data.table import TableDataModule
    from lightning_nrml.data.tables import read_label_table, write_label_table

_HOME = {
    "ArrayDataModule": "array",
    "BigEarthNetDataModule": "bigearthnet",
    "CIFARDataModule": "cifar",
    "CIFARNDataModule": "cifar",
    "CUBDataModule": "dml_benchmarks",
    "CarsDataModule": "dml_benchmarks",
    "DeepGlobeDataModule": "deepglobe",
    "DigitsDataModule": "digits",
    "EuroSATDataModule": "eurosat",
    "FolderDataModule": "folder",
    "IndexedDataset": "dataset",
    "MPerClassSampler": "samplers",
    "MultiLabelRSDataModule": "multilabel_rs",
    "NRMLDataModule": "base",
    "NeighbourSampler": "samplers",
    "NoiseConfig": "noise",
    "NoisyLabels": "noise",
    "OmniglotDataModule": "omniglot",
    "SOPDataModule": "dml_benchmarks",
    "ShuffleSampler": "samplers",
    "Split": "splits",
    "Splits": "splits",
    "TableDataModule": "table",
    "UnpaddedSampler": "samplers",
    "read_label_table": "tables",
    "write_label_table": "tables",
}

__all__ = [
    "ArrayDataModule",
    "BigEarthNetDataModule",
    "CIFARDataModule",
    "CIFARNDataModule",
    "CUBDataModule",
    "CarsDataModule",
    "DeepGlobeDataModule",
    "DigitsDataModule",
    "EuroSATDataModule",
    "FolderDataModule",
    "IndexedDataset",
    "MPerClassSampler",
    "MultiLabelRSDataModule",
    "NRMLDataModule",
    "NeighbourSampler",
    "NoiseConfig",
    "NoisyLabels",
    "OmniglotDataModule",
    "SOPDataModule",
    "ShuffleSampler",
    "Split",
    "Splits",
    "TableDataModule",
    "UnpaddedSampler",
    "read_label_table",
    "write_label_table",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
