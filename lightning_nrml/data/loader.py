"""A training loader that a resumed run continues in the middle of an epoch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_nrml.types import Batch


class ResumableLoader(DataLoader[Batch]):
    """Asks, when iteration really begins, which epoch it is and how many of its batches are done.

    The sampler (which must have ``set_epoch`` and the int attribute ``start_batch``) skips their indices, so
    nothing is decoded twice. The length stays that of a whole epoch, as Lightning goes on counting from the
    restored batch. Lightning's own way, loader states in the checkpoint, does not work for a loader that was
    built before the restore, as ``estimated_stepping_batches`` does.

    Args:
        position: returns the epoch (``None``: whichever was set) and the number of its batches that were
            trained on already.
        args, kwargs: see ``torch.utils.data.DataLoader``.
    """

    def __init__(self, *args: Any, position: Callable[[], tuple[int | None, int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._position = position

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is that of the trainer's loops. (Its presence marks a resumable loader.)"""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler: Any = self.sampler
        epoch, sampler.start_batch = self._position()
        if epoch is not None:  # Lightning's own count is one ahead when max_steps ended a run within an epoch
            sampler.set_epoch(epoch)
        yield from super().__iter__()


def start_worker(worker: int, rank: int) -> None:
    """Begin of a loader worker, which a terminal's Ctrl-C reaches, too: the main process decides about it.

    Lightning, which leaves workers alone that have such a function, would seed them, by rank as well.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if int(os.environ.get("PL_SEED_WORKERS", "0")):
        pl_worker_init_function(worker, rank)


def resume_after_whole_epochs(trainer: Trainer) -> None:
    """Let a run that ``max_steps`` ends go on from the end of an epoch as one that ``max_epochs`` ends does.

    Lightning takes such an epoch for one that was broken off and goes through its end a second time, after
    which samplers run an epoch ahead.
    """
    fit_loop: Any = trainer.fit_loop
    fit_loop._iteration_based_training = partial(_goes_on_within_an_epoch, trainer)


def _goes_on_within_an_epoch(trainer: Trainer) -> bool:
    return trainer.max_steps != -1 and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
