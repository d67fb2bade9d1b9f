"""A CSV logger that keeps what earlier runs in the same folder wrote."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class RunCSVLogger(CSVLogger):
    """Writes ``metrics.csv`` and ``hparams.yaml`` straight into the run folder.

    A resumed run continues the file; a new run in the same folder moves the old one to
    ``metrics-1.csv``, ``metrics-2.csv``, ... (Lightning's own logger deletes it in both cases). While
    ``waiting`` is set, nothing is touched until :meth:`begin`: the run may yet fail at its start.

    Args:
        save_dir: folder; default: the run folder (``trainer.default_root_dir``), or its ``test``,
            ``validate`` or ``predict`` sub-folder for those commands.
        flush_logs_every_n_steps: how often the file is written.
    """

    def __init__(self, save_dir: str | None = None, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(
            save_dir or "runs", name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps
        )
        self.resume = False
        self.waiting = False
        self._early: list[Callable[[], None]] = []
        self._opened = False

    @rank_zero_only
    def begin(self) -> None:
        """Write what was logged so far, and from now on at once."""
        self.waiting = False
        early, self._early = self._early, []
        for log in early:
            log()

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Write ``hparams.yaml``."""
        self._log(partial(super().log_hyperparams, params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write one row, with the next rows."""
        self._log(partial(super().log_metrics, dict(metrics), step))

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that wait in memory."""
        if not self.waiting:
            super().save()

    def _log(self, log: Callable[[], None]) -> None:
        if self.waiting:
            self._early.append(log)
        else:
            log()

    @property
    def log_dir(self) -> str:
        """The folder of ``metrics.csv``, without Lightning's ``name/version`` levels."""
        return self.save_dir

    @property
    def experiment(self) -> Any:
        """The writer behind this logger; opened on first use, and none before :meth:`begin`."""
        # Lightning asks early, and opening moves earlier files
        if self.waiting and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            return None
        if self._opened:
            return super().experiment
        self._opened = True
        old = self._set_aside()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            writer = super().experiment
        if old is not None and self.resume:
            old.rename(Path(self.log_dir, "metrics.csv"))
            with Path(self.log_dir, "metrics.csv").open(newline="") as file:
                writer.metrics_keys = next(csv.reader(file), [])
        return writer

    @rank_zero_only
    def _set_aside(self) -> Path | None:
        """Rename an existing ``metrics.csv`` so that opening the writer cannot delete it."""
        metrics = Path(self.log_dir, "metrics.csv")
        if not metrics.is_file():
            return None
        number = 1
        while (target := metrics.with_name(f"metrics-{number}.csv")).exists():
            number += 1
        return metrics.rename(target)
