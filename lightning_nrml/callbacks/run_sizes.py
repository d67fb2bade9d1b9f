"""What a filter may need to know of a run before it is built."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_nrml.memory import LabelLedger, SampleLedger


class RunSizes:
    """Sizes that a filter may need, from the datamodule and the module; each raises only if asked for."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.data: Any = getattr(trainer, "datamodule", None)
        self.module = pl_module

    def _find(self, name: str, *places: Any) -> int:
        for place in places:
            value = getattr(place, name, None)
            if isinstance(value, int) and value > 0:
                return value
        raise ValueError(
            f"The noise filter needs `{name}`: give your datamodule or LightningModule an int attribute "
            f"`{name}`."
        )

    @property
    def num_classes(self) -> int:
        """Number of training classes."""
        return self._find("num_classes", self.data, self.module)

    @property
    def embedding_dim(self) -> int:
        """Columns of the embedding."""
        return self._find("embedding_dim", self.module)

    @property
    def num_samples(self) -> int:
        """Size of the training set."""
        return self._find("num_train_samples", self.data, self.module)

    @property
    def num_labels(self) -> int:
        """Labels of a sample of multi-label data; 0 for data of one class per sample."""
        label = getattr(self.data, "train_label", None)
        return label.shape[1] if isinstance(label, Tensor) and label.ndim == 2 else 0

    def ledger(self) -> SampleLedger:
        """An empty ledger; of every label if the data are multi-label."""
        labels = self.num_labels
        return LabelLedger(self.num_samples, labels) if labels else SampleLedger(self.num_samples)
