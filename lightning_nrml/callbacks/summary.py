"""What a run reached and where it left things, at the end of ``fit``."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lightning_nrml.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from lightning_nrml.callbacks.evaluator import SplitEvaluator
from lightning_nrml.data.splits import Splits
from lightning_nrml.files import write_text

#: logged key -> how a person says it
ROWS = {
    "val/recall@1": "Recall@1",
    "val/map@r": "MAP@R",
    "val/top1": "accuracy",
    "val/knn_top1": "kNN top-1",
    "val/probe_top1": "linear probe top-1",
    "noise/precision": "keep precision: right among kept labels",
    "noise/recall": "keep recall: kept among right labels",
    "noise/auroc": "AUROC of the clean score",
    "noise/average_precision": "average precision of finding wrong labels",
    "train/keep_rate": "keep rate",
    "train/loss": "training loss",
}

MULTILABEL_ROWS = {
    "val/map_macro": "mAP macro",
    "val/map_micro": "mAP micro",
    "val/f1_macro": "F1 macro at 0.5",
    "val/f1_micro": "F1 micro at 0.5",
    "val/calibration_gap": "mean probability - prevalence",
}


class FitSummary(Callback):
    """Prints the final metrics that were logged, the checkpoint, the run folder and how to go on.

    Args:
        run_folder: default: the trainer's ``default_root_dir``.
    """

    def __init__(self, run_folder: str | None = None) -> None:
        self.run_folder = run_folder
        self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new run."""
        self._trained = False

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """There is something to tell of."""
        self._trained = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print on rank 0, after the progress bar has closed."""
        if stage != "fit" or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        console = Console(soft_wrap=True)
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        values.update(_epoch(trainer, "last"))
        best = _epoch(trainer, "best")
        rows = {**MULTILABEL_ROWS, **ROWS}
        if values.keys() & rows.keys():
            table = Table(title="Result", title_justify="left")
            table.add_column("metric")
            table.add_column("last epoch", justify="right")
            if best:
                table.add_column(f"best epoch ({best['epoch']:.0f})", justify="right")
            for key, said in rows.items():
                if key in values:
                    shown = [f"{values[key]:.4f}"]
                    if best:
                        shown.append(f"{best[key]:.4f}" if key in best else "")
                    table.add_row(f"{said} ({key})", *shown)
            console.print(table)
        if self._trained:  # a finished run that is resumed has logged nothing: its results stay
            self._write_results(trainer, values, best)
        for line in self.lines(trainer):
            console.print(line, markup=False, highlight=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After Ctrl-C: where the run stands and how to go on."""
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero and trainer.state.fn == "fit":
            console = Console(soft_wrap=True)
            console.print(f"Stopped in epoch {trainer.current_epoch}.", markup=False, highlight=False)
            for line in self.lines(trainer):
                console.print(line, markup=False, highlight=False)

    def _write_results(self, trainer: Trainer, last: dict[str, float], best: dict[str, float]) -> None:
        """``results.json`` in the run folder: last and best epoch, for scripts that compare runs."""
        folder = Path(self.run_folder or trainer.default_root_dir)
        versions = {name: version(name) for name in ("torch", "lightning", "timm")}
        content = {"last": last, "best": best, "steps": trainer.global_step, "versions": versions}
        write_text(folder / "results.json", json.dumps(content, indent=2, sort_keys=True))

    def lines(self, trainer: Trainer) -> list[str]:
        """Best checkpoint, run folder, and the commands that continue or evaluate the run."""
        folder = Path(self.run_folder or trainer.default_root_dir)
        config = folder / "config.yaml"
        lines = []
        best = _best(trainer)
        if best is not None:
            score = float(best.best_model_score)
            where = _near(best.best_model_path, folder)
            lines.append(f"best checkpoint  {where} ({best.monitor} {score:.4f})")
        lines.append(f"run folder       {folder}")
        if config.is_file():
            shown = f"--config {shlex.quote(str(config))}"
            if best is not None:
                named = "best" if isinstance(best, BestCheckpoint) else shlex.quote(where)
                lines.append(f"evaluate         nrml {_verb(trainer)} {shown} --ckpt_path {named}")
            if any(callback.last_model_path or callback.best_model_path for callback in _last(trainer)):
                by_steps = trainer.max_epochs == -1 or 0 < trainer.max_steps <= trainer.global_step
                limit = "max_steps" if by_steps else "max_epochs"  # whichever holds the run
                lines.append(f"train on         nrml fit {shown} --ckpt_path last --trainer.{limit} N")
        return lines


def _verb(trainer: Trainer) -> str:
    """What measures a checkpoint: folders of ``train`` and ``val`` alone have nothing to test on."""
    splits = getattr(getattr(trainer, "datamodule", None), "splits", None)
    return "validate" if isinstance(splits, Splits) and splits.test is None else "test"


def _best(trainer: Trainer) -> Any:
    """Ours, which ``--ckpt_path best`` means, or else another callback with a best checkpoint, if any."""
    known = [c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_score", None) is not None]
    return min(known, key=lambda c: not isinstance(c, BestCheckpoint), default=None)


def _last(trainer: Trainer) -> list[LastCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]


def _epoch(trainer: Trainer, which: Literal["last", "best"]) -> dict[str, float]:
    """Metrics of that evaluated epoch under their logged names, and its number; empty without them.

    Lightning keeps logged numbers as float32; the evaluator has them as they were computed, and the counts.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SplitEvaluator) and getattr(callback, which):
            return {k if k == "epoch" else f"val/{k}": v for k, v in getattr(callback, which).items()}
    return {}


def _near(path: str, folder: Path) -> str:
    """``path`` below ``folder`` as the user wrote ``folder``; other paths as they are."""
    home, absolute = folder.resolve(), Path(path).resolve()
    return str(folder / absolute.relative_to(home)) if absolute.is_relative_to(home) else path
