"""The linear probe trains its classifier only, on features in inference mode, from any checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import digits, module, state_of, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lightning_nrml.callbacks import OnlineKNN, OnlineLinearProbe
from lightning_nrml.modules import LinearProbe

NET = {
    "backbone": "conv4",
    "backbone_kwargs": {"input_size": 8, "widths": [8, 16], "strides": [1, 2]},
    "in_channels": 1,
}
NOWARN = pytest.mark.filterwarnings("ignore:LinearProbe measures a random backbone")


def probe(**kwargs) -> LinearProbe:
    torch.manual_seed(0)
    return LinearProbe(**{**NET, "num_classes": 10, **kwargs})


@NOWARN
def test_only_the_classifier_learns(tmp_path: Path) -> None:
    net = probe()
    before = state_of(net)
    run = trainer(tmp_path, 2)
    run.fit(net, digits(noise=None))
    after = state_of(net)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"linear.weight", "linear.bias"}  # no running mean of a batch norm either
    assert not net.backbone.training
    assert net.linear.training
    groups = run.optimizers[0].param_groups
    assert sum(len(g["params"]) for g in groups) == 2
    assert {(g["momentum"], g["nesterov"], g["weight_decay"]) for g in groups} == {(0.9, True, 0.0)}


def test_protocol_defaults() -> None:
    net = probe()
    assert not net.linear.weight.any()
    assert not net.linear.bias.any()
    assert (net.optimizer_config.name, net.optimizer_config.lr) == ("sgd", 0.1)
    assert (net.schedule_config.name, net.schedule_config.warmup_steps) == ("cosine", 0)
    net.train()
    assert not any(part.training for part in net.backbone.modules())
    assert not any(p.requires_grad for p in net.backbone.parameters())


def test_step_is_the_cross_entropy_of_unnormalised_features_in_inference_mode() -> None:
    net = probe()
    torch.nn.init.normal_(net.linear.weight)
    for part in net.backbone.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
    x, label = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    out = net.train().step({"image": x, "label": label, "index": torch.arange(12)})
    h = net.backbone.eval()(x)
    assert torch.allclose(out.embedding, h)
    logits = h.double() @ net.linear.weight.double().T + net.linear.bias.double()
    want = -logits.log_softmax(dim=1)[range(12), label]
    assert torch.allclose(out.per_sample_loss.double(), want, rtol=1e-4, atol=1e-5)
    out.per_sample_loss.mean().backward()
    delta = logits.softmax(dim=1) - F.one_hot(label, 10)
    assert torch.allclose(net.linear.weight.grad.double(), delta.T @ h.double() / 12, rtol=1e-3, atol=1e-5)


def test_batch_norm_standardises_the_features_and_learns_nothing() -> None:
    """By the batch in training, by running statistics afterwards, without scale and offset."""
    net = probe(batch_norm=True)
    torch.nn.init.normal_(net.linear.weight)
    x = torch.rand(12, 1, 8, 8)
    h = net.backbone(x).double()
    mean, var = h.mean(dim=0), h.var(dim=0, correction=0)
    out = net.train().step({"image": x, "label": torch.zeros(12).long(), "index": torch.arange(12)})
    weight, bias = net.linear.weight.double(), net.linear.bias.double()
    want = ((h - mean) / (var + 1e-5).sqrt()) @ weight.T + bias
    torch.testing.assert_close(out.logits.double(), want, rtol=1e-4, atol=1e-4)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"linear.weight", "linear.bias"}
    net.eval()
    later = net.predictions(x)
    scale = (0.9 + 0.1 * h.var(dim=0) + 1e-5).sqrt()
    want = ((h - 0.1 * mean) / scale) @ weight.T + bias
    torch.testing.assert_close(later["logits"].double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(later["embedding"].double(), F.normalize(h, dim=1), rtol=1e-4, atol=1e-6)


def test_starts_from_a_training_checkpoint_with_other_parts_in_it(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="pretrained")
    trained = module()  # with head, memory and online probe
    trainer(tmp_path, 1, [saver, OnlineLinearProbe()]).fit(trained, digits(noise=None))
    net = probe(init_weights=str(tmp_path / "pretrained.ckpt"))
    assert not torch.equal(net.backbone.body[0].weight, trained.backbone.body[0].weight)
    trainer(tmp_path, 1).fit(net, digits(noise=None))
    for name, value in trained.backbone.state_dict().items():
        assert torch.equal(value, net.backbone.state_dict()[name]), name
    assert net.linear.weight.any()


def test_says_that_it_measures_a_random_backbone(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="set init_weights"):
        trainer(tmp_path, 1, limit_train_batches=1).fit(probe(), digits())


@NOWARN
def test_logs_the_accuracy_of_the_logits_and_works_with_knn(tmp_path: Path) -> None:
    net, data = probe(), digits(noise=None)
    run = trainer(tmp_path, 1, [OnlineKNN()])
    run.fit(net, data)
    net.eval()
    hit1 = hit5 = total = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            logits = net.linear(net.backbone(data.apply_views(batch, training=False)["image"]))
            top = logits.topk(5, dim=1).indices == batch["label"][:, None]
            hit1, hit5, total = hit1 + int(top[:, 0].sum()), hit5 + int(top.sum()), total + len(top)
    assert float(run.callback_metrics["val/probe_top1"]) == pytest.approx(hit1 / total)
    assert float(run.callback_metrics["val/probe_top5"]) == pytest.approx(hit5 / total)
    assert 0.3 < float(run.callback_metrics["val/knn_top1"]) <= 1
    run.test(net, data, verbose=False)
    assert float(run.callback_metrics["test/probe_top1"]) == pytest.approx(hit1 / total)


@NOWARN
def test_resume_is_bit_equal(tmp_path: Path) -> None:
    saver = ModelCheckpoint(
        tmp_path, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=3
    )
    whole = probe()
    trainer(tmp_path, 2, [saver]).fit(whole, digits())
    again = probe()
    run = trainer(tmp_path / "again", 2)
    run.fit(again, digits(), ckpt_path=tmp_path / "6.ckpt", weights_only=False)
    assert torch.equal(whole.linear.weight, again.linear.weight)
    assert torch.equal(whole.linear.bias, again.linear.bias)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes is 1"):
        probe(num_classes=1)
