"""How a fit ends when it is told to: between two steps, on all ranks, with ``last.ckpt`` written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_nrml.callbacks.checkpoint import LastCheckpoint


class Interrupted(SIGTERMException):
    """Someone pressed Ctrl-C."""


class TimeIsUp(SIGTERMException):
    """SLURM has said that the job's time ends soon."""


#: what a rank can be told, in ascending order: the greatest that any was told counts for all
NOTHING, INTERRUPT, TERMINATE, REQUEUE = range(4)
STOPS = {INTERRUPT: Interrupted, TERMINATE: SIGTERMException, REQUEUE: TimeIsUp}


class StopTogether(Callback):
    """Ends a fit after the running step when any rank is told to: by Ctrl-C, SIGTERM, or SLURM near its time.

    Lightning acts within its signal handlers. There it broadcasts, beside whichever collective is running, so
    that ranks wait for each other for ever where a scheduler tells every process. And there it writes the
    checkpoint of a SLURM job, in the middle of a step, when weights, memories and counters do not belong
    together; at SIGTERM it writes none.

    At the last step of an epoch the checkpoint is written, but the fit ends one step later: the epoch's
    validation is not made up for by a resumed run. A second Ctrl-C stops at once, as does one before
    training starts.

    Args:
        trainer: its handlers are replaced, and this callback comes after all others.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer
        self.told = NOTHING
        self.at_once: Any = None  # what Ctrl-C does outside of training
        connector: Any = trainer._signal_connector
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        connector._sigterm_notifier_fn = self.note
        connector._slurm_sigusr_handler_fn = self.note_time
        epoch_loop._broadcast_sigterm_tensor = _nothing
        trainer.callbacks.append(self)  # type: ignore[attr-defined]

    def note(self, signum: int, frame: Any) -> None:
        """Handler of SIGTERM: no collective; the processes that this one launched are told, too."""
        if self.told < TERMINATE and self.trainer.strategy.launcher is not None:
            self.trainer.strategy.launcher.kill(signum)
        self.told = max(self.told, TERMINATE)
        # evaluation has no step at which ranks agree
        self.trainer._signal_connector.received_sigterm = self.trainer.state.fn != "fit"

    def note_time(self, signum: int, frame: Any) -> None:
        """Handler of SLURM's signal."""
        self.told = REQUEUE

    def note_interrupt(self, signum: int, frame: Any) -> None:
        """Handler of Ctrl-C while training."""
        self.told = max(self.told, INTERRUPT)
        self.restore()
        if self.trainer.is_global_zero:
            said = "stopping once a step is done; Ctrl-C again stops at once and saves nothing."
            # it has ended whatever read our output, too; or it came while something else was writing
            with suppress(OSError, RuntimeError, ValueError):
                print(f"\nnrml: {said}", file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C, unless a debugger or another program's handler has it."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.at_once = signal.signal(signal.SIGINT, self.note_interrupt)

    def restore(self) -> None:
        """Let Ctrl-C raise again."""
        if self.at_once is not None:
            signal.signal(signal.SIGINT, self.at_once)
            self.at_once = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over."""
        self.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Training is over, too."""
        self.restore()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Ask all ranks; save and stop if one was told.

        Raises:
            SIGTERMException: one of them was.
        """
        told = self.told
        if trainer.world_size > 1:
            largest = torch.tensor(told, device=trainer.strategy.root_device)
            told = int(trainer.strategy.reduce(largest, reduce_op="max"))
        if not told:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastCheckpoint):
                callback.save(trainer)
        if not trainer.is_last_batch:
            raise STOPS[told]


def _nothing() -> None:
    """Instead of Lightning's broadcast before each batch."""


def requeue() -> str:
    """Ask SLURM to queue this job again; returns a sentence about it."""
    job, array = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:  # one task's own id may be that of the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return f"the time of job {job} ends; stopped."
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return (
            f"the time of job {job} ends, but it could not be queued again ({error}): submit it with "
            "--ckpt_path last."
        )
    return f"the time of job {job} ends: it is queued again, and goes on from last.ckpt then."


def restarted_job() -> str | None:
    """The SLURM job that this process is part of, if SLURM has started it before."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID") if restarts != "0" else None
