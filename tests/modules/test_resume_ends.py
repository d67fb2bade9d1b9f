"""Where a run may be broken off: end of an epoch, its last step, under ``max_steps``; with any optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same_state, digits, module, state_of, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_nrml.callbacks import PRISM
from lightning_nrml.callbacks.checkpoint import LastCheckpoint
from lightning_nrml.optim import OptimizerConfig

STEPS = 8  # of an epoch


class StopAt(Callback):
    """Asks for the end of the run after a step, as ``max_time`` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def run(
    folder: Path,
    resume: Path | None = None,
    model: dict[str, Any] | None = None,
    stop: int = 0,
    **limits: Any,
):
    """Trains; leaves a checkpoint after every step (``s<n>``) and every epoch (``e<n>``) behind."""
    every = {"save_top_k": -1, "auto_insert_metric_name": False}
    callbacks = [
        PRISM(noise_rate=0.5, warmup_steps=5, window=4, granularity="epoch", max_age=2),
        ModelCheckpoint(folder, "s{step}", every_n_train_steps=1, **every),
        ModelCheckpoint(folder, "e{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, **every),
        LastCheckpoint(dirpath=str(folder / "last")),
        StopAt(stop),
    ]
    fit = trainer(folder, callbacks=callbacks, **{"limit_val_batches": 0, **limits})
    net = module(**(model or {}))
    fit.fit(net, digits(m_per_class=4), ckpt_path=resume, weights_only=False if resume else None)
    return net, fit


def same(one, two) -> None:
    """Also the step, the one that loggers write, and the rate of the schedule."""
    assert one[1].global_step == two[1].global_step
    logged = [part[1].fit_loop.epoch_loop._batches_that_stepped for part in (one, two)]
    assert logged[0] == logged[1]
    assert one[1].current_epoch == two[1].current_epoch
    assert_same_state(state_of(one[0]), state_of(two[0]))
    rates = [part[1].optimizers[0].param_groups[0]["lr"] for part in (one, two)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 5}, {"check_val_every_n_epoch": 3}])
def test_under_max_steps(tmp_path, limits):
    limits = {"max_epochs": -1, "max_steps": 28, "limit_val_batches": 1, **limits}
    whole = run(tmp_path / "whole", **limits)
    for name in ("e1", "s12", f"s{limits.get('limit_train_batches', STEPS)}"):
        same(whole, run(tmp_path / name, tmp_path / "whole" / f"{name}.ckpt", **limits))


def test_stopped_by_max_steps_within_an_epoch(tmp_path):
    model = {"schedule": {"name": "constant", "warmup_steps": 0}}
    whole = run(tmp_path / "whole", model=model, max_epochs=-1, max_steps=28)
    run(tmp_path / "part", model=model, max_epochs=-1, max_steps=12)
    last = tmp_path / "part" / "last" / "last.ckpt"
    same(whole, run(tmp_path / "rest", last, model, max_epochs=-1, max_steps=28))


@pytest.mark.parametrize("limits", [{}, {"limit_val_batches": 1, "val_check_interval": 0.5}])
def test_stopped_within_an_epoch(tmp_path, limits):
    """In the middle, where a validation is due, at the last step, and in the last epoch."""
    limits = {"max_epochs": 4, **limits}
    whole, resume = run(tmp_path / "whole", **limits), None
    for step in (11, 12, 16, 30):
        part = run(tmp_path / str(step), resume, stop=step, **limits)
        assert part[1].global_step == step
        resume = tmp_path / str(step) / "last" / "last.ckpt"
    same(whole, run(tmp_path / "rest", resume, **limits))


@pytest.mark.parametrize("validation", [0, 1])
def test_twice_from_the_last_step_of_an_epoch(tmp_path, validation):
    limits = {"max_epochs": 4, "limit_val_batches": validation}
    whole = run(tmp_path / "0", **limits)
    same(whole, run(tmp_path / "1", tmp_path / "0" / f"s{STEPS}.ckpt", **limits))
    same(whole, run(tmp_path / "2", tmp_path / "1" / "e1.ckpt", **limits))
    same(whole, run(tmp_path / "3", tmp_path / "2" / f"s{3 * STEPS}.ckpt", **limits))


@pytest.mark.parametrize("name", ["lars", "lamb", "lion", "sgd"])
def test_any_optimiser_resumes(tmp_path, name):
    model = {"optimizer": OptimizerConfig(name, lr=0.01)}
    whole = run(tmp_path / "whole", model=model, max_epochs=2)
    same(whole, run(tmp_path / "rest", tmp_path / "whole" / "e0.ckpt", model, max_epochs=2))
