"""Self-supervised runs: train 3 epochs = stop, resume, go on, bit for bit, with teacher and queue."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_same_state, state_of, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from ssl_runs import METHODS, digits, module

from lightning_nrml.callbacks import OnlineLinearProbe
from lightning_nrml.modules import MetricLearning

STATE = {
    "SimCLR": ["projector.0.weight"],
    "MoCo": ["teacher.module.0.body.0.weight", "queue.embedding", "queue.index", "queue.pointer"],
    "BYOL": ["teacher.module.1.0.weight", "teacher.module.0.body.1.running_mean", "predictor.0.weight"],
    "SwAV": ["prototypes.weight", "queues.1.embedding", "queues.0.pointer"],
    "MoCHi": ["teacher.module.0.body.0.weight", "queue.embedding"],
}


class _Start(Callback):
    """Keeps the state with which training begins."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.state = state_of(pl_module)


def _run(folder: Path, method: str, resume: Path | None = None, precision: str = "32-true", **options):
    saver = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=7, save_top_k=-1, save_on_train_epoch_end=False
    )
    net, start = module(method, **options), _Start()
    callbacks = [saver, start, OnlineLinearProbe()]
    run = trainer(folder, 3, callbacks, limit_train_batches=5, limit_val_batches=0, precision=precision)
    run.fit(net, digits(method), ckpt_path=resume, weights_only=False if resume else None)
    return net, run, start.state


@pytest.mark.parametrize(("method", "precision"), [*((m, "32-true") for m in METHODS), ("MoCo", "bf16-true")])
def test_resume_in_mid_epoch_is_bit_equal(tmp_path: Path, method: str, precision: str) -> None:
    whole, run, _ = _run(tmp_path / "whole", method, precision=precision)
    saved = tmp_path / "whole" / "step=7.ckpt"
    keys = torch.load(saved, weights_only=False)["state_dict"]
    for key in [*STATE[method], "probes.linear.weight"]:
        assert key in keys, key
    assert bool(keys["probes.linear.weight"].any())
    resumed, rerun, restored = _run(tmp_path / "again", method, saved, precision)
    assert_same_state(restored, keys)
    assert rerun.global_step == run.global_step == 15
    assert_same_state(state_of(whole), state_of(resumed))
    one, two = (t.optimizers[0].state_dict()["state"] for t in (run, rerun))
    assert all(torch.equal(one[i]["exp_avg"], two[i]["exp_avg"]) for i in one)


@pytest.mark.parametrize(
    ("method", "argument"), [*((m, "backbone_ckpt") for m in METHODS), ("MoCo", "init_weights")]
)
def test_metric_learning_starts_from_any_checkpoint(tmp_path: Path, method: str, argument: str) -> None:
    net, _, _ = _run(tmp_path, method)
    kwargs = {"backbone": "conv4", "backbone_kwargs": {"input_size": 8, "widths": [8, 16], "strides": [2, 2]}}
    start = _Start()
    tuned = MetricLearning(
        **kwargs, in_channels=1, embedding_dim=4, **{argument: str(tmp_path / "step=14.ckpt")}
    )
    trainer(tmp_path / "tuned", 1, [start], limit_train_batches=1, limit_val_batches=0).fit(
        tuned, digits("SimCLR")
    )
    saved = torch.load(tmp_path / "step=14.ckpt", weights_only=False)["state_dict"]
    backbone = {k: v for k, v in saved.items() if k.startswith("backbone.")}
    assert_same_state(backbone, {k: v for k, v in start.state.items() if k.startswith("backbone.")})
    assert net.backbone.state_dict().keys() == tuned.to_backbone().state_dict().keys()


def test_a_teacher_follows_start_weights_and_the_queue_is_new(tmp_path: Path) -> None:
    _run(tmp_path, "MoCo")
    start, net = _Start(), module("MoCo", init_weights=str(tmp_path / "step=14.ckpt"))
    fresh = net.queue.embedding.clone()
    trainer(tmp_path / "next", 1, [start], limit_train_batches=1, limit_val_batches=0).fit(
        net, digits("MoCo")
    )
    state = start.state
    assert torch.equal(state["teacher.module.0.body.0.weight"], state["backbone.body.0.weight"])
    assert torch.equal(state["teacher.module.1.0.weight"], state["projector.0.weight"])
    assert torch.equal(state["queue.embedding"], fresh)
    assert bool((state["queue.index"] == -1).all())


def test_a_resumed_run_with_start_weights_keeps_its_own_teacher_and_queue(tmp_path: Path) -> None:
    _run(tmp_path, "MoCo")
    begin, saved = str(tmp_path / "step=7.ckpt"), tmp_path / "step=14.ckpt"
    _, _, restored = _run(tmp_path / "again", "MoCo", saved, init_weights=begin)
    assert_same_state(restored, torch.load(saved, weights_only=False)["state_dict"])


def test_a_resumed_run_does_not_read_its_start_backbone_again(tmp_path: Path) -> None:
    _run(tmp_path, "SimCLR")
    begin = tmp_path / "step=14.ckpt"

    def tune(folder: str, epochs: int, resume: Path | None = None) -> MetricLearning:
        torch.manual_seed(0)
        kwargs = {"input_size": 8, "widths": [8, 16], "strides": [2, 2]}
        net = MetricLearning("conv4", kwargs, 1, embedding_dim=4, backbone_ckpt=str(begin))
        saver = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        run = trainer(tmp_path, epochs, [saver], limit_train_batches=2, limit_val_batches=0)
        run.fit(net, digits("SimCLR"), ckpt_path=resume, weights_only=False if resume else None)
        return net

    whole = tune("a", 2)
    begin.unlink()
    resumed = tune("b", 2, tmp_path / "a" / "epoch=0.ckpt")
    assert_same_state(state_of(whole), state_of(resumed))
    again = MetricLearning.load_from_checkpoint(tmp_path / "a" / "epoch=1.ckpt")
    assert again.backbone_ckpt is None
