"""Consensus in a real run: finds wrong labels, logs its estimate, resumes bit for bit."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from lightning_nrml.callbacks import Consensus, RetrievalEvaluator
from lightning_nrml.data import DigitsDataModule, NoiseConfig
from lightning_nrml.losses import CombinedLoss, ContrastiveLoss, CosineSoftmaxLoss, Loss
from lightning_nrml.modules import MetricLearning
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig


def fit(tmp_path, epochs, loss: Loss | None = None, ckpt_path=None, granularity="batch"):
    L.seed_everything(0, verbose=False)
    data = DigitsDataModule(batch_size=64, m_per_class=8, noise=NoiseConfig("symmetric", 0.4))
    module = MetricLearning(
        backbone="conv4",
        backbone_kwargs={"input_size": 8, "widths": [16, 16], "strides": [2, 2]},
        in_channels=1,
        embedding_dim=16,
        loss=loss,
        optimizer=OptimizerConfig(lr=3e-3),
        schedule=ScheduleConfig("constant", warmup_steps=0),
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        max_steps=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        callbacks=[Consensus(warmup_steps=20, granularity=granularity), RetrievalEvaluator()],
        enable_checkpointing=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("own_classifier", [False, True])
def test_finds_the_wrong_labels_of_real_images(tmp_path, own_classifier):
    loss = CombinedLoss([ContrastiveLoss(), CosineSoftmaxLoss(10, 16)]) if own_classifier else None
    trainer, module = fit(tmp_path, 8, loss)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    wrong = float(trainer.datamodule.train_is_noise.float().mean())
    assert metrics["noise/auroc"] > 0.9
    assert metrics["noise/precision"] > 0.85
    assert metrics["noise/estimated_rate"] == pytest.approx(wrong, abs=0.15)
    side = module.filters["consensus"].side
    assert bool(side.weight.any()) != own_classifier


@pytest.mark.parametrize("granularity", ["batch", "epoch"])
def test_two_halves_equal_the_whole(tmp_path, granularity):
    whole, module = fit(tmp_path / "whole", 4, granularity=granularity)
    half, _ = fit(tmp_path / "half", 2, granularity=granularity)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = fit(tmp_path / "again", 4, ckpt_path=tmp_path / "half.ckpt", granularity=granularity)
    state, other = module.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        same = value == other[name]
        if value.is_floating_point():
            same |= value.isnan() & other[name].isnan()
        assert bool(torch.all(same)), name
    assert whole.global_step == resumed.global_step
