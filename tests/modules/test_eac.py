"""EAC: views, one real step equals the loss by hand, learning, resume bit for bit, evaluation, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_state, state_of, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lightning_nrml.callbacks import PRISM
from lightning_nrml.data import DigitsDataModule, NoiseConfig
from lightning_nrml.data.views import EACViews, MetricView, ViewKey
from lightning_nrml.losses import EACLoss
from lightning_nrml.modules import EAC
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig


def digits(**kwargs: Any) -> DigitsDataModule:
    options = {"batch_size": 50, "train_view": EACViews(8), "test_size": 1297}
    return DigitsDataModule(**{**options, **kwargs})


def module(cls: type[EAC] = EAC, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "backbone": "conv4",
        "backbone_kwargs": {"input_size": 8, "widths": [8, 16], "strides": [1, 2]},
        "in_channels": 1,
        "num_classes": 10,
        "optimizer": OptimizerConfig("adam", 1e-2),
        "schedule": ScheduleConfig("constant", 0),
    }
    return cls(**{**options, **kwargs})


def test_second_view_is_the_mirror_image_and_each_erases_on_its_own():
    image = torch.rand(200, 1, 8, 8)
    key = ViewKey(3)
    plain, mirrored = EACViews(8, erasing=0.0, noise=0.0)(image, key)
    assert torch.equal(plain, image)
    assert torch.equal(mirrored, image.flip(3))
    plain, mirrored = (view == 0 for view in EACViews(8, noise=0.0)(image, key))
    gone, gone_too = (x.flatten(1).any(1) for x in (plain, mirrored))
    assert 0.35 < gone.float().mean() < 0.65
    assert 0.35 < gone_too.float().mean() < 0.65
    assert 0.3 < (gone == gone_too).float().mean() < 0.7
    assert plain.flatten(1).float().mean(1).max() < 0.35
    noisy, _ = EACViews(8, erasing=0.0)(image * 0.5 + 0.25, key)
    differ = (noisy - (image * 0.5 + 0.25)).flatten(1)
    assert 0.35 < (differ != 0).any(1).float().mean() < 0.65
    assert differ[(differ != 0).any(1)].std() == pytest.approx(30**0.5 / 255, rel=0.05)
    grey, _ = EACViews(8, erasing=1.0, noise=0.0, mean=(0.3,), std=(0.2,))(image, key)
    assert (grey == 0).flatten(1).any(1).all()


class Seen(EAC):
    """Keeps the batch of the last step."""

    def step(self, batch: Any) -> Any:
        self.seen = batch
        return super().step(batch)


def test_first_step_equals_the_loss_by_hand(tmp_path):
    net, copy = module(cls=Seen, optimizer=OptimizerConfig("sgd", 0.1, weight_decay=0.0)), module()
    run = trainer(tmp_path, 1, max_steps=1, limit_val_batches=0)
    run.fit(net, digits())
    image, mirrored = net.seen["views"]
    assert torch.equal(image, net.seen["image"])
    maps, other = copy.backbone.body(image), copy.backbone.body(mirrored)
    logits = maps.mean((2, 3)) @ copy.classifier.weight.T + copy.classifier.bias
    loss = EACLoss(5.0)(logits, net.seen["label"], maps, other, copy.classifier.weight)
    loss.backward()
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, moved), old in zip(net.named_parameters(), copy.parameters(), strict=True):
        want = old.detach() - 0.1 * 1.9 * old.grad  # the first step of Nesterov's momentum 0.9
        torch.testing.assert_close(moved.detach(), want, rtol=1e-4, atol=1e-6, msg=name)


def test_learns_logs_and_resumes_bit_for_bit(tmp_path):
    def fit(folder: Path, resume: Path | None = None):
        net = module(lam=0.5)
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, auto_insert_metric_name=False)
        run = trainer(folder, 4, [saver, PRISM(noise_rate=0.1, similarity="proxy", warmup_steps=20)])
        noisy = digits(noise=NoiseConfig("symmetric", 0.2, 1))
        run.fit(net, noisy, ckpt_path=resume, weights_only=False if resume else None)
        return net, run.callback_metrics

    whole, logged = fit(tmp_path / "whole")
    assert float(logged["val/top1"]) > 0.3
    assert float(logged["train/attention"]) > 0
    assert {"train/cross_entropy", "noise/precision"} <= logged.keys()
    resumed, again = fit(tmp_path / "half", tmp_path / "whole" / "1.ckpt")
    assert_same_state(state_of(whole), state_of(resumed))
    assert float(again["val/top1"]) == float(logged["val/top1"])


def test_accuracy_embedding_and_prediction(tmp_path):
    net, data = module(), digits()
    run = trainer(tmp_path)
    logged = run.test(net, data, verbose=False)[0]
    data.setup("test")
    batch = data.apply_views(next(iter(data.test_dataloader())), training=False)
    net.eval()
    out = net.predictions(batch["image"])
    assert out["embedding"].shape == (len(batch["image"]), net.embedding_dim) == (len(batch["image"]), 16)
    torch.testing.assert_close(out["embedding"], net.embed(batch["image"]))
    torch.testing.assert_close(out["probability"].sum(1), torch.ones(len(batch["image"])))
    hits = [
        net.predictions(b["image"])["probability"].argmax(1) == b["label"]
        for b in (data.apply_views(b, training=False) for b in data.test_dataloader())
    ]
    assert logged["test/top1"] == pytest.approx(float(torch.cat(hits).float().mean()))


def test_timm_backbones_and_their_maps():
    net = module(backbone="resnet18", backbone_kwargs=None, stem="cifar")
    net.eval()
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(net.embed(x), F.normalize(net.backbone(x), dim=1), rtol=1e-4, atol=1e-5)
    assert net.classifier.in_features == 512


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="num_classes is None"):
        module(num_classes=None)
    with pytest.raises(ValueError, match=r"feature maps .* which 'vit_tiny_patch16_224' does not give"):
        module(backbone="vit_tiny_patch16_224", backbone_kwargs=None)
    with pytest.raises(ValueError, match=r"two views of each image, .* the batch holds 1: .* EACViews"):
        trainer(tmp_path, 1).fit(module(), digits(train_view=MetricView(8)))
