"""What the evaluation callbacks share: when to collect, compute and log."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric


def is_final(trainer: Trainer) -> bool:
    """Whether no epoch comes after this validation of a fit: ``max_epochs``, ``max_steps`` or told to stop.

    Not Lightning's own ``fit_loop.done``: during a validation it does not count the present epoch yet.
    """
    steps_done = 0 < trainer.max_steps <= trainer.global_step
    return steps_done or trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop


class SplitCallback(Callback):
    """Follows every run over the validation and the test split; subclasses say what to do there.

    Args:
        every_n_epochs: validation epochs between two evaluations; the last epoch always counts.

    Raises:
        ValueError: ``every_n_epochs`` below 1.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs is {every_n_epochs}: it must be 1 or more.")
        self.every_n_epochs = every_n_epochs

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Before the first batch of a run over a split, ``"val"`` or ``"test"``."""

    @abstractmethod
    def update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Take in one batch and what the module's step returned for it."""

    @abstractmethod
    def finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """After the last batch: log."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run."""
        self.begin(trainer, pl_module, "val")

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
        self.update(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log ``val/*``."""
        self.finish(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run."""
        self.begin(trainer, pl_module, "test")

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
        self.update(trainer, pl_module, outputs, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log ``test/*``."""
        self.finish(trainer, pl_module, "test")


class SplitEvaluator(SplitCallback):
    """Feeds a metric with the outputs of every validation and test run, and logs the result.

    The values of a fit's last epoch and of its best one (by ``monitor``) are kept in ``last`` and ``best``,
    since picking the best on the test split flatters. To evaluate a checkpoint does not change this record.

    Args:
        monitor: entry of the result that decides which epoch was best.
        every_n_epochs: validation epochs between two evaluations; the last epoch always counts.
    """

    def __init__(self, monitor: str, every_n_epochs: int = 1) -> None:
        super().__init__(every_n_epochs)
        self.monitor = monitor
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self._metric: Any = None
        self._fitting = True

    @abstractmethod
    def make_metric(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> Metric:
        """An empty metric for one run over a split, ``"val"`` or ``"test"``."""

    @abstractmethod
    def collect(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Give one batch to ``self._metric``."""

    def results(self, values: dict[str, Any], prefix: str) -> dict[str, float]:
        """What to log of the metric's result."""
        return {k: float(v) for k, v in values.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only a fit changes the record: what a checkpoint says of an earlier epoch is old beside it."""
        self._fitting = stage == "fit"
        if self._fitting:  # a resumed one gets its own from the checkpoint
            self.last, self.best = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Last and best values, so that a resumed run still reports the best epoch of all."""
        return {"last": dict(self.last), "best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore last and best values, if a fit is resumed."""
        if self._fitting:
            self.last, self.best = dict(state_dict["last"]), dict(state_dict["best"])

    def begin(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Start collecting, if this epoch counts.

        Raises:
            ValueError: there are several loaders, whose indices would be taken for the same samples.
        """
        loaders = trainer.test_dataloaders if prefix == "test" else trainer.val_dataloaders
        if isinstance(loaders, (list, tuple, dict)) and len(loaders) > 1:
            raise ValueError(
                f"{type(self).__name__} measures one {prefix} loader, but there are {len(loaders)}: return "
                "one, or leave this callback out."
            )
        counts = (trainer.current_epoch + 1) % self.every_n_epochs == 0 or is_final(trainer)
        skip = self._fitting and not counts
        self._metric = None if skip else self.make_metric(trainer, pl_module, prefix).to(pl_module.device)

    def update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Collect one batch."""
        if self._metric is not None:
            self.collect(trainer, pl_module, outputs, batch)

    def finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Compute and log."""
        if self._metric is None:
            return
        values = self.results(self._metric.compute(), prefix)
        self._metric = None
        for key, value in values.items():
            if key.startswith("num_"):
                continue
            # the metric gathers, so this is equal on all ranks, which checkpoint callbacks rely on;
            # sync_dist only keeps Lightning from warning that it might not be
            pl_module.log(f"{prefix}/{key}", value, prog_bar=key == self.monitor, sync_dist=True)
        if prefix == "val" and self._fitting and not trainer.sanity_checking:
            self.last = {"epoch": float(trainer.current_epoch), **values}
            if not self.best or values[self.monitor] > self.best[self.monitor]:
                self.best = dict(self.last)
