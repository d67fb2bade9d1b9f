"""Worker processes of loaders."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning_nrml.data import DigitsDataModule


def test_workers_do_not_mind_ctrl_c() -> None:
    """A terminal sends it to them as well; the main process may go on to the end of a step, or of a fit."""
    data = DigitsDataModule(batch_size=64, num_workers=1)
    data.setup("fit")
    batches: Any = data.val_dataloader()
    each = iter(batches)
    seen = [len(next(each)["label"])]
    (worker,) = each._workers
    os.kill(worker.pid, signal.SIGINT)
    seen += [len(batch["label"]) for batch in each]
    assert sum(seen) == len(batches.dataset)
    assert worker.is_alive()
    each._shutdown_workers()
    assert not worker.is_alive()
