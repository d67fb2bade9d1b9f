"""What classifiers of one class per sample share: their accuracy in evaluation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_nrml.metrics import TopKAccuracy
from lightning_nrml.modules.base import EmbeddingModule
from lightning_nrml.types import Batch


class Classifier(EmbeddingModule):
    """Base of the methods with a classifier: counts right answers and logs ``val/*`` and ``test/*``.

    A subclass sets ``accuracy`` and gives the scores of the classes among its :meth:`predictions`.

    Arguments are those of :class:`EmbeddingModule`.
    """

    accuracy: TopKAccuracy
    #: which of the predictions ``(B, L)`` holds a score of every class
    score_key: ClassVar[str]
    #: what stands before ``top1`` in the logged names
    accuracy_prefix: ClassVar[str] = ""

    @property
    def knows_classes(self) -> bool:
        """Whether the evaluated classes are those of the classifier, so that there is something to count."""
        return True

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Predictions, labels and indices; counts right answers."""
        out = self._embed_batch(batch)
        if self.knows_classes and "label" in out:
            self.accuracy.update(out[self.score_key].float(), out["label"])
        return out

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self.accuracy.reset()

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self.accuracy.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies as ``val/*``."""
        self._log_accuracy("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracies as ``test/*``."""
        self._log_accuracy("test")

    def _log_accuracy(self, stage: str) -> None:
        if self.knows_classes:
            for key, value in self.accuracy.compute().items():
                name = f"{stage}/{self.accuracy_prefix}{key}"
                self.log(name, value, prog_bar=key == "top1", sync_dist=True)
