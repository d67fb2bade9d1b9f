"""Train k + k epochs = train k, stop, resume k: bit for bit, with every piece of state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_state, digits, module, state_of, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_nrml.callbacks import PRISM, RetrievalEvaluator
from lightning_nrml.losses import CosineSoftmaxLoss, MarginLoss

CASES: dict[str, dict[str, Any]] = {
    "avg": {"filter": {"noise_rate": 0.5, "warmup_steps": 5, "window": 4}},
    "vmf": {"filter": {"noise_rate": 0.5, "similarity": "vmf"}},
    "epoch": {"filter": {"noise_rate": 0.5, "granularity": "epoch", "max_age": 2}},
    "dropout": {"filter": {"noise_rate": 0.3}, "module": {"backbone": "mobilenetv3_small_050"}},
    "softmax": {"filter": {"noise_rate": 0.5}, "loss": lambda: CosineSoftmaxLoss(10, 16)},
    "margin": {"filter": {"noise_rate": 0.5}, "loss": lambda: MarginLoss(num_classes=10)},
    "workers": {"filter": {"noise_rate": 0.5}, "data": {"num_workers": 1}},
}


def _run(folder: Path, case: dict[str, Any], epochs: int, resume: Path | None = None, **saver: Any):
    options = dict(case.get("module", {}))
    if "backbone" in options:
        options["backbone_kwargs"] = {"drop_rate": 0.3}
    if case.get("loss"):
        torch.manual_seed(0)
        options["loss"] = case["loss"]()
    net, data = module(**options), digits(**{"m_per_class": 4, **case.get("data", {})})
    saver = {"filename": "{epoch}", "save_top_k": -1, "auto_insert_metric_name": False, **saver}
    callbacks = [
        PRISM(**case["filter"]),
        RetrievalEvaluator(),
        _Stop(epochs),
        ModelCheckpoint(folder, **saver),
    ]
    run = trainer(folder, 4, callbacks)
    run.fit(net, data, ckpt_path=resume, weights_only=False if resume else None)
    return net, run


class _Stop(Callback):
    """Ends the run after some epochs without changing its planned length (and so its schedule)."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("name", list(CASES))
def test_two_halves_equal_the_whole(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    whole, run = _run(tmp_path / "whole", case, 4)
    _run(tmp_path / "half", case, 2)
    resumed, rerun = _run(tmp_path / "half", case, 4, tmp_path / "half" / "1.ckpt")
    assert rerun.global_step == run.global_step
    assert_same_state(state_of(whole), state_of(resumed))
    one, two = (t.optimizers[0].state_dict()["state"] for t in (run, rerun))
    assert all(torch.equal(one[i]["exp_avg"], two[i]["exp_avg"]) for i in one)
    assert float(run.callback_metrics["val/map@r"]) == float(rerun.callback_metrics["val/map@r"])


@pytest.mark.parametrize("name", ["avg", "epoch", "margin", "workers"])
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, name: str) -> None:
    every = {"filename": "{step}", "every_n_train_steps": 3, "save_on_train_epoch_end": False}
    whole, run = _run(tmp_path, CASES[name], 4, **every)
    resumed, rerun = _run(tmp_path / "again", CASES[name], 4, tmp_path / "12.ckpt", **every)
    assert rerun.global_step == run.global_step
    assert_same_state(state_of(whole), state_of(resumed))


def test_checkpoint_holds_every_memory(tmp_path: Path) -> None:
    _run(tmp_path, CASES["epoch"], 2)
    keys = torch.load(tmp_path / "1.ckpt", weights_only=False)["state_dict"].keys()
    for key in (
        "memory.embedding",
        "memory.pointer",
        "filters.prism.memory",
        "filters.prism.centers",
        "filters.prism.window_values",
        "noise_ledger.dropped",
        "noise_ledger.keep",
        "feature_bank.embedding",
        "feature_bank.drawn",
    ):
        assert key in keys, key


def test_checkpoint_with_filter_state_loads_without_the_filter(tmp_path: Path) -> None:
    _run(tmp_path, CASES["avg"], 2)
    run = trainer(tmp_path, 4, [evaluator := RetrievalEvaluator()])
    run.validate(module(), digits(), ckpt_path=tmp_path / "1.ckpt", weights_only=False, verbose=False)
    assert evaluator._metric is None
    assert 0.3 < float(run.callback_metrics["val/recall@1"]) <= 1


_CHILD = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
import test_resume
from test_resume import CASES, _run, state_of
import torch
folder, resume = Path(sys.argv[1]), sys.argv[2]
net, run = _run(folder, CASES["avg"], 4, Path(resume) if resume else None, filename="last", save_top_k=1,
                enable_version_counter=False)
torch.save(state_of(net), folder / "final.pt")
"""


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, then resume from the last checkpoint on disk."""
    script = tmp_path / "child.py"
    here = Path(__file__).parent
    script.write_text(_CHILD.format(tests=str(here.parent), here=str(here)))

    def start(folder: Path, resume: str = "") -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
        return subprocess.Popen([sys.executable, str(script), str(folder), resume], env=env)

    assert start(tmp_path / "whole").wait() == 0
    child = start(tmp_path / "killed")
    last = tmp_path / "killed" / "last.ckpt"
    while not last.exists():
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed" / "final.pt").exists()
    assert start(tmp_path / "killed", str(last)).wait() == 0
    finals = [torch.load(tmp_path / n / "final.pt") for n in ("whole", "killed")]
    assert_same_state(*finals)
