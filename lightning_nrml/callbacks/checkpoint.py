"""Two checkpoints with fixed names per run: ``last.ckpt`` to resume from, ``best.ckpt`` to evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_nrml.callbacks.evaluator import is_final
from lightning_nrml.data.labelled import LabelledData
from lightning_nrml.files import make_folder

#: callback -> how the names of its metrics start
LOGGED_BY = {
    "OnlineKNN": ("val/knn_",),
    "OnlineLinearProbe": ("val/probe_",),
    "MultiLabelEvaluator": ("val/map_", "val/f1_", "val/calibration"),
    "RetrievalEvaluator": ("val/recall@", "val/map@r", "val/r_precision"),
}


class _RunCheckpoint(ModelCheckpoint):
    """A checkpoint in a run folder, which may be moved, and may hold the checkpoints of an earlier run.

    These are put aside, into ``previous/``, when a new run has done its first step. A resume or an evaluation
    would otherwise take them for its own until it has written one, which it may never do.
    """

    _of_earlier_run: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the file that is there belongs to another run."""
        super().on_train_start(trainer, pl_module)
        folder, resumed = Path(str(self.dirpath)), trainer.ckpt_path
        file = folder / f"{self.filename}.ckpt"
        goes_on = resumed is not None and Path(str(resumed)).resolve().parent == folder.resolve()
        mine = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
        self._of_earlier_run = file if mine and not goes_on and file.is_file() else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Put it aside; a run that fails at its start leaves it where it is."""
        file, self._of_earlier_run = self._of_earlier_run, None
        if file is not None:
            aside = file.parent / "previous" / file.name
            make_folder(aside.parent)
            file.replace(aside)
            rank_zero_info(f"The checkpoint of an earlier run in this folder is now {aside}.")
        super().on_train_batch_end(trainer, pl_module, *args)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Know the checkpoints of a run that was moved.

        Lightning forgets the best score then, and the next validation, however bad, overwrote best.ckpt.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        resumed, here = Path(str(trainer.ckpt_path)), Path(str(self.dirpath))
        if state and state["dirpath"] != self.dirpath and resumed.resolve().parent == here.resolve():
            state["dirpath"] = self.dirpath
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[key] = _moved(state[key], here)
            state["best_k_models"] = {_moved(k, here): v for k, v in state["best_k_models"].items()}


class LastCheckpoint(_RunCheckpoint):
    """Writes ``last.ckpt`` at the end of every ``every_n_epochs``-th training epoch, and of the last one.

    Lightning's own ``save_last=True`` writes only when a *best* checkpoint was written too, so a resume
    would fall back to the best epoch.

    Args:
        every_n_epochs: epochs between two writes; 0 = no such checkpoint.
        dirpath: folder; default ``<run folder>/checkpoints``.
    """

    def __init__(self, every_n_epochs: int = 1, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    @property
    def best_model_path(self) -> str:
        """Empty: Lightning calls the newest file the best one if there is no metric, and W&B repeats it."""
        return ""

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        if path:
            self.last_model_path = path

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take a checkpoint of the last step of an epoch for one of the epoch's end, and no other one.

        Lightning forgets to count the epoch that such a run goes on with, and leaves one out when the run is
        resumed once more. The validation that was due after the step is not made up for. An epoch that
        ``max_time`` or another request to stop broke off is gone on with; Lightning takes it for a whole one.
        """
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        _compare_labels(trainer, checkpoint)
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        batches, epochs = loop.get("epoch_loop.batch_progress"), loop.get("epoch_progress")
        if not batches:
            return
        if not batches["is_last_batch"]:
            broken_off = epochs["current"]["completed"] < epochs["current"]["processed"]
            if broken_off and trainer.max_steps == -1:  # the datamodule sees to those
                # as if written after the step, in the middle of the epoch
                for part in ("total", "current"):
                    epochs[part]["processed"] -= 1
                    batches[part]["completed"] -= 1
                stepped = batches["current"]["ready"] % trainer.accumulate_grad_batches == 0
                loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= stepped
            return
        unfinished = batches["current"]["completed"] < batches["current"]["processed"]
        if unfinished and epochs["current"]["processed"] < epochs["current"]["started"]:
            for part in ("total", "current"):
                batches[part]["completed"] = batches[part]["processed"]
                epochs[part]["processed"] = epochs[part]["started"]
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # counted after the step's hooks

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if this epoch counts; what was trained after that would be lost if no epoch follows."""
        self._last_global_step_saved = 0  # what was written within the last step is not the epoch's end
        super().on_train_epoch_end(trainer, pl_module)
        if is_final(trainer):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write now, on all ranks together, unless this step was saved or the checkpoint is switched off."""
        if self._every_n_epochs and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse the optimiser state of another optimiser, which a resumed run would stumble over later.

        Raises:
            ValueError: the restored state lacks a setting that this optimiser needs.
        """
        super().on_train_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            needed = optimizer.defaults.keys() - {"differentiable"}  # torch adds it on restoring
            missing = {key for group in optimizer.param_groups for key in needed - group.keys()}
            if missing:
                raise ValueError(
                    f"The checkpoint's optimiser is not {type(optimizer).__name__} (it has no "
                    f"{', '.join(sorted(missing))}): resume with the optimiser of the run, or start anew "
                    "from its weights with model.init_weights."
                )


class BestCheckpoint(_RunCheckpoint):
    """Writes ``best.ckpt`` whenever ``monitor`` improves; does nothing while nobody logs that metric.

    Args:
        monitor: key of a logged metric; ``None`` = no such checkpoint.
        mode: whether the largest or the smallest value is best.
        dirpath: folder; default ``<run folder>/checkpoints``.
    """

    def __init__(
        self,
        monitor: str | None = "val/recall@1",
        mode: Literal["min", "max"] = "max",
        dirpath: str | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the metric improved in this epoch."""
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the metric improved in this validation."""
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the run ends without a best checkpoint."""
        super().on_train_end(trainer, pl_module)
        wanted = self.monitor is not None and not getattr(trainer, "fast_dev_run", False)
        if wanted and not self.best_model_path:
            rank_zero_info(f"No best.ckpt was written: {self._why_none(trainer)}")

    def _why_none(self, trainer: Trainer) -> str:
        known = [name for name, start in LOGGED_BY.items() if str(self.monitor).startswith(start)]
        attached = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]
        if attached & set(known) and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed:
            every = trainer.check_val_every_n_epoch
            return (
                f"the run had no validation: it ended before trainer.check_val_every_n_epoch ({every}), or "
                "the data have no validation split, or limit_val_batches is 0."
            )
        mend = f"Add the {known[0]} callback" if known else "Log it from your module or a callback"
        return (
            f"nothing logged '{self.monitor}'. {mend}, or set checkpoint_best.monitor to a metric that is "
            "logged."
        )


def _compare_labels(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let the datamodule compare its labels with those of a checkpoint that another class's data left.

    Lightning hands a datamodule only the state of its own class.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, LabelledData) and type(data).__qualname__ not in checkpoint:
        states = (v for v in checkpoint.values() if isinstance(v, dict) and "hash" in v.get("noise", ()))
        for state in states:
            data.load_state_dict(state)


def _moved(path: str, folder: Path) -> str:
    """The file of that name in ``folder``; an empty path stays so."""
    return str(folder / Path(path).name) if path else ""
