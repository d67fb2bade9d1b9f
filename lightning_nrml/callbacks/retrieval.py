"""Retrieval evaluation on the validation and test splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_nrml.callbacks.embedding import embedding_of
from lightning_nrml.callbacks.evaluator import SplitEvaluator
from lightning_nrml.metrics import RetrievalMetrics


class RetrievalEvaluator(SplitEvaluator):
    """Logs Recall@k, MAP@R and R-precision of every validation and test run.

    Every item of the split is a query against all others (itself excluded). Reads the ``embedding``,
    ``label`` and ``index`` that a module's ``validation_step``/``test_step`` returns; modules that
    return none are asked through ``embed(batch["image"])``. The values of a fit's last epoch and of its best
    one (by ``monitor``) are kept in ``last`` and ``best``, since picking the best on the test classes
    flatters.

    Args:
        ks: the k of Recall@k.
        monitor: key that decides which epoch was best.
        every_n_epochs: validation epochs between two evaluations; the last epoch always counts.
    """

    def __init__(
        self, ks: Sequence[int] = (1, 2, 4, 8), monitor: str = "recall@1", every_n_epochs: int = 1
    ) -> None:
        if not ks or min(ks) < 1:
            raise ValueError(f"ks is {list(ks)}: give at least one k, each 1 or more.")
        known = {*(f"recall@{k}" for k in ks), "map@r", "r_precision"}
        if monitor not in known:
            raise ValueError(
                f"monitor is '{monitor}': with these ks choose one of {', '.join(sorted(known))}."
            )
        super().__init__(monitor, every_n_epochs)
        self.ks = tuple(ks)

    def make_metric(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> RetrievalMetrics:
        """Retrieval metrics of the wanted k."""
        return RetrievalMetrics(ks=self.ks)

    def collect(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Embeddings that the module's step returned, or that its ``embed`` gives."""
        embedding = embedding_of(trainer, pl_module, outputs, batch)
        self._metric.update(embedding, batch["label"], batch["index"])
