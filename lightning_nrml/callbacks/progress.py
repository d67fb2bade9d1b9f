"""Progress bar with the two numbers that matter while training on noisy labels."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

#: logged key -> short name in the bar
SHOWN = {"train/loss": "loss", "train/keep_rate": "keep", "val/recall@1": "R@1"}


class NRMLProgressBar(RichProgressBar):
    """Rich progress bar that shows loss, keep rate and the last Recall@1, whatever else is logged.

    Args:
        refresh_rate: batches between two refreshes; 0 switches the bar off.
        leave: keep the bar of each epoch on the screen.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows: short names, at most three significant digits."""
        known: dict[str, Any] = {**trainer.callback_metrics, **trainer.progress_bar_metrics}
        return {short: f"{float(known[key]):.3g}" for key, short in SHOWN.items() if key in known}

    def _get_train_description(self, current_epoch: int) -> str:
        """Lightning counts epochs to -2 where only ``max_steps`` ends a run."""
        return super()._get_train_description(current_epoch).replace("/-2", "")
