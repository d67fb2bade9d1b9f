"""Retrieval evaluation on the validation and test splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_nrml.metrics import RetrievalMetrics


class RetrievalEvaluator(Callback):
    """Logs Recall@k, MAP@R and R-precision of every validation and test run.

    Every item of the split is a query against all others (itself excluded). Reads the ``embedding``,
    ``label`` and ``index`` that a module's ``validation_step``/``test_step`` returns; modules that
    return none are asked through ``embed(batch["image"])``. Both the last epoch and the best one (by
    ``monitor``) are kept in ``summary``, since picking the best on the test classes flatters.

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
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs is {every_n_epochs}: it must be 1 or more.")
        known = {*(f"recall@{k}" for k in ks), "map@r", "r_precision"}
        if monitor not in known:
            raise ValueError(
                f"monitor is '{monitor}': with these ks choose one of {', '.join(sorted(known))}."
            )
        self.ks, self.monitor, self.every_n_epochs = tuple(ks), monitor, every_n_epochs
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self._metric: RetrievalMetrics | None = None

    def state_dict(self) -> dict[str, Any]:
        """Last and best values, so that a resumed run still reports the best epoch of all."""
        return {"last": dict(self.last), "best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore last and best values."""
        self.last, self.best = dict(state_dict["last"]), dict(state_dict["best"])

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        final = trainer.max_epochs is not None and epoch == trainer.max_epochs
        skip = trainer.state.fn == "fit" and epoch % self.every_n_epochs and not final
        self._metric = None if skip else RetrievalMetrics(ks=self.ks).to(pl_module.device)

    def _update(self, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._metric is None:
            return
        if isinstance(outputs, dict) and "embedding" in outputs:
            embedding = outputs["embedding"]
        else:
            with torch.no_grad():
                embedding = pl_module.embed(batch["image"])  # type: ignore[operator]
        self._metric.update(embedding, batch["label"], batch["index"])

    def _finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        if self._metric is None:
            return
        values = {k: float(v) for k, v in self._metric.compute().items()}
        self._metric = None
        for key, value in values.items():
            if key.startswith("num_"):
                continue
            # the metric gathers, so this is equal on all ranks, which checkpoint callbacks rely on;
            # sync_dist only keeps Lightning from warning that it might not be
            pl_module.log(f"{prefix}/{key}", value, prog_bar=key == self.monitor, sync_dist=True)
        if prefix == "val" and not trainer.sanity_checking:
            self.last = {"epoch": float(trainer.current_epoch), **values}
            if not self.best or values[self.monitor] > self.best[self.monitor]:
                self.best = dict(self.last)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting."""
        self._begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect one batch."""
        self._update(pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log ``val/*``."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting."""
        self._begin(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect one batch."""
        self._update(pl_module, outputs, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log ``test/*``."""
        self._finish(trainer, pl_module, "test")
