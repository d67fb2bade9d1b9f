"""Which validations count, and whose values an evaluator keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import digits, module, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_nrml.callbacks import OnlineKNN, RetrievalEvaluator

EPOCH = 8  # batches


class CountingKNN(OnlineKNN):
    """Remembers the epochs that it evaluated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(mode="running", **kwargs)
        self.epochs: list[int] = []

    def finish(self, trainer, pl_module, prefix) -> None:
        if self._knn is not None:
            self.epochs.append(trainer.current_epoch)
        super().finish(trainer, pl_module, prefix)


class StopIn(Callback):
    """Ends the run in the middle of an epoch, as a time limit does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch and batch_idx == 4


class Validated(RetrievalEvaluator):
    """Remembers the epochs that it evaluated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epochs: list[int] = []

    def finish(self, trainer, pl_module, prefix) -> None:
        super().finish(trainer, pl_module, prefix)
        if self.last and self.last["epoch"] not in self.epochs:
            self.epochs.append(int(self.last["epoch"]))


@pytest.mark.parametrize(
    "end",
    [
        {"max_epochs": 5},
        {"max_epochs": -1, "max_steps": 5 * EPOCH},
        {"max_epochs": 9, "max_steps": 5 * EPOCH},
        {"max_epochs": 9, "stop": 4},
    ],
    ids=str,
)
def test_the_last_epoch_counts_however_the_run_ends(tmp_path: Path, end: dict[str, int]) -> None:
    options = dict(end)
    stop = [StopIn(options.pop("stop"))] if "stop" in options else []
    evaluator, knn = Validated(every_n_epochs=2), CountingKNN(every_n_epochs=2)
    run = trainer(tmp_path, callbacks=[evaluator, knn, *stop], limit_val_batches=2, **options)
    run.fit(module(), digits())
    assert evaluator.epochs == knn.epochs == [1, 3, 4]
    assert evaluator.last["epoch"] == 4


def test_only_a_fit_changes_the_record(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    evaluator, net, data = RetrievalEvaluator(), module(), digits()
    run = trainer(tmp_path, 3, [evaluator, saver])
    run.fit(net, data)
    last, best = dict(evaluator.last), dict(evaluator.best)
    assert last["epoch"] == 2
    for evaluate in (run.test, run.validate):
        evaluate(net, data, ckpt_path=tmp_path / "0.ckpt", weights_only=False, verbose=False)
        assert (evaluator.last, evaluator.best) == (last, best)
    fresh = RetrievalEvaluator()
    run = trainer(tmp_path, 3, [fresh])
    run.fit(net, data, ckpt_path=tmp_path / "2.ckpt", weights_only=False)  # over already: restored values
    assert (fresh.last, fresh.best) == (last, best)


def test_a_second_fit_has_a_record_of_its_own(tmp_path: Path) -> None:
    evaluator = RetrievalEvaluator()
    trainer(tmp_path, 3, [evaluator]).fit(module(), digits())
    evaluator.best[evaluator.monitor] = 2.0  # no fit reaches that
    trainer(tmp_path, 1, [evaluator]).fit(module(), digits())
    assert evaluator.best["epoch"] == evaluator.last["epoch"] == 0
    assert evaluator.best[evaluator.monitor] <= 1


def test_several_loaders_are_refused(tmp_path: Path) -> None:
    data = digits()
    loader = data.val_dataloader()
    data.val_dataloader = lambda: [loader, loader]
    with pytest.raises(ValueError, match="RetrievalEvaluator measures one val loader, but there are 2"):
        trainer(tmp_path, 1, [RetrievalEvaluator()]).fit(module(), data)
