"""Worker processes of loaders."""

from __future__ import annotations

import os
import random
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

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


class Drawing(Dataset[float]):
    """Random numbers of the generators that users' transforms draw from."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> float:
        return random.random() + float(np.random.random())  # noqa: NPY002 - as users' code does


def draws(rank: int) -> list[float]:
    """Of a worker that begins as those of a data module do in the process of this rank."""
    data = DigitsDataModule(batch_size=64)
    data.trainer = SimpleNamespace(global_rank=rank)
    data.setup("validate")
    begin = data.val_dataloader().worker_init_fn
    torch.manual_seed(5)
    return [float(x) for x in DataLoader(Drawing(), num_workers=1, worker_init_fn=begin)]


def test_workers_of_other_ranks_draw_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Lightning sees to, but not for workers that have a function of their own."""
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    assert draws(0) == draws(0)
    assert set(draws(0)).isdisjoint(draws(1))
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    assert draws(0) == draws(1)
