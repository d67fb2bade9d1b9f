"""What a run reached and where it left things, at the end of ``fit``."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

#: logged key -> how a person says it
ROWS = {
    "val/recall@1": "Recall@1",
    "val/map@r": "MAP@R",
    "val/knn_top1": "kNN top-1",
    "noise/precision": "noise found: precision",
    "noise/recall": "noise found: recall",
    "noise/auroc": "noise found: AUROC",
    "train/keep_rate": "kept of each batch",
    "train/loss": "training loss",
}


class FitSummary(Callback):
    """Prints the final metrics that were logged, the checkpoint, the run folder and how to go on.

    Args:
        run_folder: default: the trainer's ``default_root_dir``.
    """

    def __init__(self, run_folder: str | None = None) -> None:
        self.run_folder = run_folder

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print on rank 0, after the progress bar has closed."""
        if stage != "fit" or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        console = Console(soft_wrap=True)
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key in ROWS}
        if values:
            table = Table(title="Result of the last epoch", title_justify="left")
            table.add_column("metric")
            table.add_column("value", justify="right")
            for key in ROWS:
                if key in values:
                    table.add_row(f"{ROWS[key]} ({key})", f"{values[key]:.4f}")
            console.print(table)
        for line in self.lines(trainer):
            console.print(line, markup=False, highlight=False)

    def lines(self, trainer: Trainer) -> list[str]:
        """Best checkpoint, run folder, and the commands that continue or evaluate the run."""
        folder = Path(self.run_folder or trainer.default_root_dir)
        config = folder / "config.yaml"
        lines = []
        best = next(
            (c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_score", None) is not None),
            None,
        )
        if best is not None:
            score = float(best.best_model_score)  # type: ignore[attr-defined]
            lines.append(f"best checkpoint  {best.best_model_path} ({best.monitor} {score:.4f})")  # type: ignore[attr-defined]
        lines.append(f"run folder       {folder}")
        if config.is_file():
            if best is not None:
                lines.append(f"evaluate         nrml test --config {config} --ckpt_path best")
            lines.append(
                f"train on         nrml fit --config {config} --ckpt_path last --trainer.max_epochs N"
            )
        return lines
