"""The full resolved config goes to the run folder and to every logger, once, on rank 0."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_nrml.cli.loggers import RunCSVLogger
from lightning_nrml.cli.run_folder import FolderClaim
from lightning_nrml.files import write_text


class RunConfig(SaveConfigCallback):
    """Writes ``<run folder>/config.yaml``, with the command that led to it, and logs the same content.

    The run folder stays as it is until one batch has gone through: a run that fails at its start must not
    take the place of an earlier one. While a fit runs, no other process may train in the same folder.

    Nested keys keep their dots (``model.init_args.embedding_dim``), so dashboards can filter by them.
    The id of a W&B run is kept in the checkpoint: a resumed run continues the same curve.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Any, folder: str, arguments: Sequence[str] = ("fit",)
    ) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)
        self.folder = Path(folder)
        self.verb, self.command = arguments[0], f"nrml {shlex.join(arguments)}".replace("\n", "\\n")
        self.wandb_id: str | None = None
        self._text: str | None = None
        self._claim = FolderClaim()

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Rank 0 only; called once, before any other setup."""
        if self.verb == "fit" and self.folder.is_dir():
            self._claim.take(self.folder)
        self._text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)
        config = yaml.safe_load(self._text)
        for logger in trainer.loggers:
            # the CSV logger writes one YAML file: nested is readable there, flat is searchable elsewhere
            logger.log_hyperparams(config if isinstance(logger, CSVLogger) else flatten(config))
            if isinstance(logger, WandbLogger):
                self.wandb_id = logger.version

    def _begin(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Write, once; only rank 0 has a text."""
        if self._text is None or trainer.sanity_checking:
            return
        if self.verb == "fit":
            self._claim.take(self.folder)
        path = self.folder / self.config_filename
        head = f"# written by 'nrml {self.verb}'; run again with --config {path}\n# command: {self.command}\n"
        write_text(path, head + self._text)
        self._text = None
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.begin()

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _begin

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Other runs may use the folder."""
        self._claim.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same for a run that was broken off."""
        self._claim.release()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the W&B run id, and the SLURM job that goes on with it if it is restarted."""
        return {"wandb_id": self.wandb_id, "slurm_job": os.environ.get("SLURM_JOB_ID")}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}, "c": [{"d": 2}]} -> {"a.b": 1, "c.0.d": 2}``; empty branches are kept."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, dict | list) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat
