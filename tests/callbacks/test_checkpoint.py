"""What the checkpoints of a run notice when it is resumed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import digits, module, trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_nrml.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from lightning_nrml.data import ArrayDataModule


def array(folder: Path, labels: np.ndarray) -> ArrayDataModule:
    """Digits by another class."""
    data = digits()
    images = data.splits.train.images.get(range(len(labels))).numpy()[:, 0]
    np.savez(
        folder / "a.npz", image=images, label=labels, train_class=np.arange(len(labels)) < len(labels) - 99
    )
    return ArrayDataModule(str(folder / "a.npz"), batch_size=32, m_per_class=4, epoch_length=256)


@pytest.mark.parametrize("same", [True, False])
def test_other_labels_are_noticed_whatever_class_brings_them(tmp_path: Path, same: bool) -> None:
    """Lightning gives a datamodule the state of its own class only."""
    labels = digits().train_label.numpy()
    trainer(tmp_path, 1, [LastCheckpoint(dirpath=str(tmp_path))], limit_val_batches=0).fit(
        module(), array(tmp_path, labels)
    )

    class Other(ArrayDataModule):
        pass

    other = Other(str(tmp_path / "a.npz"), batch_size=32, m_per_class=4, epoch_length=256)
    if not same:
        array(tmp_path, labels[::-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, 2, [LastCheckpoint(dirpath=str(tmp_path))], limit_val_batches=0)
        run.fit(module(), other, ckpt_path=tmp_path / "last.ckpt")
    told = [str(w.message) for w in caught if "resuming on other train labels" in str(w.message)]
    assert len(told) == (not same)
    assert run.current_epoch == 2


@pytest.mark.parametrize("log_model", [True, "all"])
def test_wandb_calls_the_best_checkpoint_best_and_the_last_one_latest(
    tmp_path: Path, log_model: bool | str
) -> None:
    """Both are versions of one artifact; an alias belongs to the version that got it last."""

    class Run:
        id = "x"
        summary: ClassVar[dict] = {}

        def __init__(self) -> None:
            self.holder: dict[str, str] = {}

        def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
            self.holder |= dict.fromkeys(aliases, artifact.metadata["original_filename"])

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    run = Run()
    logger = WandbLogger(log_model=log_model, experiment=run, save_dir=tmp_path)
    monitor = BestCheckpoint("train/loss", "min", str(tmp_path))
    both = [monitor, LastCheckpoint(dirpath=str(tmp_path))]
    trainer(tmp_path, 2, both, limit_val_batches=0, logger=logger).fit(module(), digits())
    assert run.holder == {"best": "best.ckpt", "latest": "last.ckpt"}
    assert both[1].last_model_path == str(tmp_path / "last.ckpt")
