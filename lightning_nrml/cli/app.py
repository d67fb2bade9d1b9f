"""``NRMLCLI``: LightningCLI with short class names, links from data to model, one run folder per run,
checked checkpoints and errors of one sentence."""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_nrml.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from lightning_nrml.callbacks.predictions import PredictionWriter
from lightning_nrml.callbacks.progress import NRMLProgressBar
from lightning_nrml.callbacks.run_card import RunCard
from lightning_nrml.callbacks.summary import FitSummary
from lightning_nrml.cli.checkpoint_file import check_checkpoint, saved_by_run
from lightning_nrml.cli.errors import UserError
from lightning_nrml.cli.explain import explain, raised_by, user_error
from lightning_nrml.cli.loggers import RunCSVLogger
from lightning_nrml.cli.nulls import understand_nested_null
from lightning_nrml.cli.recipes import changed, config_arguments, expand_configs, is_inline, option
from lightning_nrml.cli.run_folder import (
    CHECKPOINTS,
    check_writable,
    default_run_folder,
    resolve_checkpoint,
    saved_roots,
    with_run,
)
from lightning_nrml.cli.save_config import RunConfig
from lightning_nrml.cli.signals import Interrupted, StopTogether, TimeIsUp, requeue, restarted_job
from lightning_nrml.cli.trainer import NRMLTrainer, check_embeds

#: read from the data once it exists, and handed to models that take them
LINKED = ("num_classes", "in_channels")

#: verbs that Lightning does not have; ``--out`` says where each writes
OWN_VERBS = ("audit", "embed", "export")

#: our sections of the config, and what switches each off
SWITCHES = {
    "checkpoint_last": "every_n_epochs to 0",
    "checkpoint_best": "monitor to null",
    "run_card": "show to false",
}

TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {"class_path": f"{RunCSVLogger.__module__}.{RunCSVLogger.__name__}"},
    "use_distributed_sampler": False,  # our samplers know their rank; Lightning's would undo them
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the run card tells the size
}


class NRMLCLI(LightningCLI):
    """The command line of this package; also usable from Python with ``args=[...]``.

    Config keys beside Lightning's: ``checkpoint_last``, ``checkpoint_best`` (see
    :mod:`lightning_nrml.callbacks.checkpoint`) and ``run_card``. The run folder is
    ``trainer.default_root_dir``, by default ``runs/<name of the config file>``.

    Args:
        args: command line arguments; ``None`` takes them from ``sys.argv``.
        run: whether to run the subcommand; without, only instantiate (no subcommand in ``args``).
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        load_classes()
        understand_nested_null()
        given = expand_configs(sys.argv[1:] if args is None else args)
        self.arguments = with_run(given)
        self.run_folder = Path("runs")
        self._ckpt_path: str | None = None
        self._open: list[tuple[Namespace, str, Any]] = []
        self._roots: list[Path] = []
        parser_kwargs: dict[str, Any] = {
            "parser_mode": "omegaconf",
            "exit_on_error": False,
            "allow_abbrev": False,
        }
        subcommands = {name: dict(parser_kwargs) for name in self.subcommands()}
        with without_known_deprecations():
            super().__init__(
                model_class=LightningModule,
                datamodule_class=LightningDataModule,
                trainer_class=NRMLTrainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=RunConfig,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,
                parser_kwargs={"prog": "nrml", **parser_kwargs, **(subcommands if run else {})},
                args=self.arguments,
                run=run,
                auto_configure_optimizers=False,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs and ours, with the arguments that the config does not give."""
        return {**LightningCLI.subcommands(), **{verb: {"model", "datamodule"} for verb in OWN_VERBS}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints, run card and the links from data to model."""
        parser.add_class_arguments(LastCheckpoint, "checkpoint_last")
        parser.add_class_arguments(BestCheckpoint, "checkpoint_best")
        parser.add_class_arguments(RunCard, "run_card")
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; then settle run folder and checkpoint before anything heavy is built."""
        self.config = parser.parse_args(args)
        config = self._section()
        model, data = (config.get(key, {}).get("class_path", "") for key in ("model", "data"))
        trainer = config.trainer
        root = trainer.default_root_dir
        configs = [value for _, value in config_arguments(args) if not is_inline(value)]
        self.run_folder = Path(root) if root else default_run_folder(configs, model, data)
        trainer.default_root_dir = str(self.run_folder)
        self._roots = [self.run_folder, *saved_roots(configs)]
        for key, mend in SWITCHES.items():
            if config[key] is None:
                raise UserError(f"{key} cannot be null: to do without, set {key}.{mend}.")
        for key in ("checkpoint_last", "checkpoint_best"):
            old = [root / CHECKPOINTS for root in self._roots]
            self._follow(config[key], "dirpath", str(self.run_folder / CHECKPOINTS), old)
        command = self.config.get("subcommand", "fit")
        # the last one wins, but a saved config after --ckpt_path, whose null means "anew", takes nothing back
        given = config.get("ckpt_path") or option(self.arguments, "--ckpt_path")
        if command == "fit" and given is None:
            given = self._of_restarted_job()
        self._ckpt_path = resolve_checkpoint(command, None if given == "null" else given, self.run_folder)
        if self._ckpt_path is not None:
            check_checkpoint(self._ckpt_path)
        if command == "predict" and config.get("return_predictions") is None:
            config.return_predictions = False  # PredictionWriter has them
        # kept from Lightning until the run, which would overlay the config with the file's hyperparameters
        if "ckpt_path" in config:
            config.ckpt_path = None
        self._place_loggers(command, config)
        self._check_places(command, config)

    def _of_restarted_job(self) -> str | None:
        """``last`` if SLURM runs this job once more, and what lies in the run folder was written by it."""
        job, last = restarted_job(), self.run_folder / CHECKPOINTS / "last.ckpt"
        if job is None or not last.is_file():
            return None
        check_checkpoint(str(last))
        if saved_by_run(str(last), self._section().get("weights_only")).get("slurm_job") != job:
            return None
        rank_zero_info(f"SLURM has started job {job} again: it goes on from {last}.")
        return "last"

    def _check_places(self, command: str, config: Namespace) -> None:
        """See that what the command writes can be written, before minutes go into building data and model."""
        check_writable(self.run_folder)
        if command == "fit":
            for key in ("checkpoint_last", "checkpoint_best"):
                check_writable(Path(config[key].dirpath), f"--{key}.dirpath")
        else:
            given = command in OWN_VERBS and config.get("out")
            check_writable(self.output_folder, "--out" if given else "--trainer.default_root_dir")

    def _section(self) -> Namespace:
        return self.config.get(self.config.get("subcommand") or "", self.config)

    def _place_loggers(self, command: str, config: Namespace) -> None:
        """Loggers without a folder of their own write to the run folder (evaluation: a sub-folder)."""
        logger = config.trainer.logger
        self.output_folder = self.run_folder if command == "fit" else self.run_folder / command
        if command in OWN_VERBS and config.get("out"):
            self.output_folder = Path(config.out)
            if command == "export":  # a file
                self.output_folder = self.output_folder.parent
        for entry in logger if isinstance(logger, list) else [logger]:
            if not isinstance(entry, Namespace) or "init_args" not in entry:
                continue
            init = entry.init_args
            name = str(entry.class_path).rsplit(".", 1)[-1]
            if name == RunCSVLogger.__name__:
                old = [root / verb for root in self._roots for verb in ("", *self.subcommands())]
                self._follow(init, "save_dir", str(self.output_folder), old)
            if name == WandbLogger.__name__:
                self._follow(init, "save_dir", str(self.run_folder), self._roots, unset=".")
                self._follow(init, "name", self.run_folder.name, [root.name for root in self._roots])
                if command == "fit" and self._ckpt_path:
                    kept = saved_by_run(self._ckpt_path, config.get("weights_only"))
                    self._follow(init, "id", kept.get("wandb_id"))

    def _follow(
        self,
        section: Namespace,
        key: str,
        value: str | None,
        old: Iterable[Path | str] = (),
        unset: Any = None,
    ) -> None:
        """Let ``section.key`` follow from the run folder or checkpoint, unless the user gave it.

        The saved config leaves it open: whoever runs that in another folder must not write here. Configs
        that were saved with such values hold one of ``old``, which nobody gave.
        """
        if section.get(key) in (None, unset, *map(str, old)):
            self._open.append((section, key, unset))
            section[key] = value

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add our callbacks; leave out what the trainer's own switches forbid."""
        self._record_links()
        trainer = self._section().trainer
        callbacks: list[Callback] = [] if trainer.enable_progress_bar is False else [NRMLProgressBar()]
        callbacks.append(FitSummary(str(self.run_folder)))
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter(str(self.output_folder)))
        keys = ["run_card"]
        if trainer.enable_checkpointing is not False:
            keys += ["checkpoint_best", "checkpoint_last"]  # the last one holds what the best one knows
        built = self.config_init.get(self.subcommand or "", self.config_init)
        callbacks += [built[key] for key in keys]
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        arguments = self.arguments if self.subcommand else ["fit", *self.arguments]
        self.save_config_kwargs = {"folder": str(self.output_folder), "arguments": arguments}
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, RuntimeError) as error:  # the last: two callbacks of one kind
            if user_error(error) is None and raised_by(error, "lightning"):
                raise UserError(f"trainer: {error}") from error
            raise

    def _record_links(self) -> None:
        """Write what the data told the model into the config, so that the saved one is what ran.

        Checkpoint, W&B id and places are taken out again: the saved config serves to start anew, anywhere.
        """
        if "ckpt_path" in self._section():
            self._section().ckpt_path = None
        for section, key, unset in self._open:
            section[key] = unset
        init = self._section().get("model.init_args") or {}
        for name in LINKED:
            if name not in init or getattr(self.datamodule, name, None) is None:
                continue
            of_data = int(getattr(self.datamodule, name))
            if init[name] not in (None, of_data, default_of(type(self.model), name)):
                rank_zero_warn(
                    f"model.{name}: {init[name]} in the config, {of_data} in the data; these decide."
                )
            init[name] = of_data

    def before_instantiate_classes(self) -> None:
        """Give the checkpoint back to the subcommand's arguments."""
        if "ckpt_path" in self._section():
            self._section().ckpt_path = self._ckpt_path

    def before_predict(self) -> None:
        """Lightning would ask a module without ``predict_step`` for ``forward``, which does not help."""
        check_embeds(self.model)

    def after_instantiate_classes(self) -> None:
        """A resumed run continues its metrics file; any run lets :class:`RunConfig` say when it begins."""
        StopTogether(self.trainer)
        if config_arguments(self.arguments):
            self.trainer.changed = ", ".join(changed(self.arguments))  # type: ignore[attr-defined]
        for logger in self.trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.resume = self._ckpt_path is not None
                callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
                logger.waiting = any(isinstance(callback, RunConfig) for callback in callbacks)


def default_of(cls: type, name: str) -> Any:
    """The default of an argument of ``cls``, which a parent may have that gets it by ``**kwargs``."""
    own = (inspect.signature(base.__init__).parameters.get(name) for base in cls.__mro__)  # type: ignore[misc]
    return next((parameter.default for parameter in own if parameter is not None), None)


#: their classes may be named in YAML without a path
ROOMS = ("modules", "data", "callbacks", "losses", "filters")


def load_classes() -> None:
    """Import our classes and third-party filters (entry points): YAML may then use short class names.

    Raises:
        UserError: an installed plug-in cannot be imported.
    """
    for room in ROOMS:
        package = import_module(f"lightning_nrml.{room}")
        for name in package.__all__:  # exports may be lazy
            getattr(package, name)
    for point in entry_points(group="lightning_nrml.filters"):
        try:
            point.load()
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"The installed filter plug-in '{point.name}' ({point.value}) cannot be imported: {error}."
            ) from error


#: what Lightning 2.6 triggers in jsonargparse >= 4.49, and jsonargparse's introduction to these
KNOWN_DEPRECATIONS = (
    "``ArgumentParser.add_instantiator`` was deprecated",
    "``instantiate_classes`` was deprecated",
    "skip_none parameter was deprecated",
    "By default only one JsonargparseDeprecationWarning per type is shown",
    "`isinstance(treespec, LeafSpec)` is deprecated",
)
#: notes of Lightning that tell users of this package nothing
ADVERTISEMENTS = ("litlogger",)


@contextmanager
def without_known_deprecations() -> Iterator[None]:
    """Hide these warnings and only these: they are Lightning's to mend."""
    with warnings.catch_warnings():
        for text in KNOWN_DEPRECATIONS:
            warnings.filterwarnings("ignore", message=r"\s*" + re.escape(text))
        yield


def without_advertisements() -> None:
    """Keep the log free of :data:`ADVERTISEMENTS`; every other message passes."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_tells_something)


def _tells_something(record: logging.LogRecord) -> bool:
    return not any(word in str(record.msg) for word in ADVERTISEMENTS)


def run(args: list[str]) -> int:
    """Run the command line ``args``; user errors become one sentence on stderr and exit code 2."""
    debug = os.environ.get("NRML_DEBUG", "") not in ("", "0")
    try:
        args = expand_configs(args)
        without_advertisements()
        NRMLCLI(args)
    except TimeIsUp:
        print(f"nrml: {requeue()}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except SIGTERMException as stop:  # a SystemExit without a code, which a shell would take for success
        by_hand = isinstance(stop, Interrupted)
        hint = " Go on with the same command and --ckpt_path last." if "fit" in args[:1] else ""
        print(f"nrml: stopped by {'Ctrl-C' if by_hand else 'SIGTERM'}.{hint}", file=sys.stderr)
        return 128 + (signal.SIGINT if by_hand else signal.SIGTERM)
    except SystemExit as stop:  # --help, --print_config, Ctrl-C
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        told = user_error(error)
        if debug or told is None:
            raise
        print(f"nrml: {explain(told, args)}", file=sys.stderr)
        return 2
    return 0
