"""A training loader that a resumed run continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_nrml.types import Batch


class ResumableLoader(DataLoader[Batch]):
    """Asks, when iteration really begins, how many batches of this epoch are done, and leaves them out.

    The sampler (which must have the int attribute ``start_batch``) skips their indices, so nothing is
    decoded twice. The length stays that of a whole epoch, as Lightning goes on counting from the restored
    batch. Lightning's own way, loader states in the checkpoint, does not work for a loader that was built
    before the restore, as ``estimated_stepping_batches`` does.

    Args:
        batches_done: returns the number of batches of the current epoch that were trained on already.
        args, kwargs: see ``torch.utils.data.DataLoader``.
    """

    def __init__(self, *args: Any, batches_done: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches_done = batches_done

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is that of the trainer's loops. (Its presence marks a resumable loader.)"""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler: Any = self.sampler
        sampler.start_batch = self._batches_done()
        yield from super().__iter__()
