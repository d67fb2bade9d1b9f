"""The online probe learns beside the training without touching it, and survives a resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import assert_same_state, digits, module, state_of, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F

from lightning_nrml.callbacks import NoiseFilterCallback, OnlineLinearProbe
from lightning_nrml.callbacks.probe import ProbeHead
from lightning_nrml.filters import FixedFilter
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig


def test_gradient_equals_the_formula() -> None:
    """dCE/dlogits = softmax - onehot, on unit rows times sqrt(D)."""
    g = torch.Generator().manual_seed(0)
    z, label = torch.randn(9, 4, generator=g), torch.tensor([0, 1, 2, 0, 1, 2, 0, -7, 1])  # below 0 = none
    head = ProbeHead(4, 3)
    head.weight.data = torch.randn(3, 4, generator=g)
    head.bias.data = torch.randn(3, generator=g)
    loss = head.gradient(z, label)
    known = label >= 0
    x = (F.normalize(z.double(), dim=1) * 2)[known]
    p = (x @ head.weight.double().T + head.bias.double()).softmax(dim=1)
    delta = p - F.one_hot(label[known], 3)
    assert float(loss) == pytest.approx(float(-p[range(8), label[known]].log().mean()), rel=1e-6)
    assert torch.allclose(head.weight.grad.double(), delta.T @ x / 8, atol=1e-6)
    assert torch.allclose(head.bias.grad.double(), delta.mean(dim=0), atol=1e-6)
    assert torch.allclose(head(z), head(z * 50))


def test_gradient_of_a_batch_without_labels_is_zero() -> None:
    head = ProbeHead(4, 3)
    assert float(head.gradient(torch.randn(2, 4), torch.tensor([-1, -1]))) == 0
    assert not head.weight.grad.any()


@pytest.mark.parametrize("seeded", [True, False])
def test_does_not_change_a_bit_of_the_training(tmp_path: Path, monkeypatch, seeded: bool) -> None:
    runs = []
    for callbacks in ([], [OnlineLinearProbe()]):
        # clipping by the norm of all gradients and weight decay would notice further weights
        net = module(
            backbone="mobilenetv3_small_050",
            backbone_kwargs={"drop_rate": 0.3},
            optimizer=OptimizerConfig("adamw", 2e-3, weight_decay=0.1),
        )
        run = trainer(tmp_path, 2, callbacks, gradient_clip_val=0.1)
        if not seeded:
            monkeypatch.delenv("PL_GLOBAL_SEED")
        run.fit(net, digits(epoch_length=96))
        runs.append((net, run))
    states = [{k: v for k, v in state_of(net).items() if not k.startswith("probes")} for net, _ in runs]
    assert_same_state(*states)
    sizes = [sum(len(group["params"]) for group in run.optimizers[0].param_groups) for _, run in runs]
    assert sizes[0] == sizes[1]
    assert runs[1][0].probes["linear"].weight.any()
    assert all(p.grad is None for p in runs[1][0].probes.parameters())


class PlainSGD(Callback):
    """The same classifier by autograd and torch's own optimiser, from the recorded embeddings."""

    def __init__(self, key: str) -> None:
        self.linear = torch.nn.Linear(16, 10)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.key = key
        self.sgd = torch.optim.SGD(self.linear.parameters(), 0.1, momentum=0.9, nesterov=True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with torch.enable_grad():
            x = F.normalize(outputs["embedding"], dim=1) * 4
            F.cross_entropy(self.linear(x), batch[self.key]).backward()
        self.sgd.step()
        self.sgd.zero_grad()


@pytest.mark.parametrize(("label", "key"), [("given", "label"), ("clean", "clean_label")])
def test_equals_a_hand_written_classifier(tmp_path: Path, label: str, key: str) -> None:
    net, data, plain = module(), digits(), PlainSGD(key)
    probe = OnlineLinearProbe(OptimizerConfig("sgd", 0.1, weight_decay=0.0), label=label)
    run = trainer(tmp_path, 2, [probe, plain])
    run.fit(net, data)
    head = net.probes["linear"]
    assert torch.allclose(head.weight, plain.linear.weight, atol=1e-5)
    assert torch.allclose(head.bias, plain.linear.bias, atol=1e-5)
    net.eval()
    hits = total = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            z = net.embed(data.apply_views(batch, training=False)["image"])
            hits += int((plain.linear(z * 4).argmax(dim=1) == batch["label"]).sum())
            total += len(z)
    assert float(run.callback_metrics["val/probe_top1"]) == pytest.approx(hits / total, abs=2 / total)


class PlainAdam(PlainSGD):
    """The default optimiser: Adam at 1e-2 without weight decay."""

    def __init__(self) -> None:
        super().__init__("label")
        self.sgd = torch.optim.Adam(self.linear.parameters(), 1e-2)


def test_a_step_per_batch_on_all_rows_whatever_the_training_leaves_out(tmp_path: Path) -> None:
    """Under gradient accumulation too, and on rows that a filter drops; by default with plain Adam."""
    net, plain = module(schedule=ScheduleConfig("cosine", 0)), PlainAdam()
    data = digits(test_size=1297)
    probe, filtering = OnlineLinearProbe(), NoiseFilterCallback(FixedFilter([True, False] * 250))
    run = trainer(tmp_path, 1, [probe, plain, filtering], accumulate_grad_batches=3, limit_train_batches=5)
    run.fit(net, data)
    assert run.global_step == 2
    assert all(float(s["step"]) == 5 for s in probe.state_dict()["optimizer"]["state"].values())
    assert 0 < float(run.callback_metrics["train/keep_rate"]) < 1
    assert torch.allclose(net.probes["linear"].weight, plain.linear.weight, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_of_another_type(tmp_path: Path, precision: str) -> None:
    run = trainer(tmp_path, 1, [OnlineLinearProbe()], precision=precision)
    run.fit(module(), digits())
    assert 0.2 < float(run.callback_metrics["val/probe_top1"]) < 1


def test_runs_in_test_too(tmp_path: Path) -> None:
    net, run = module(), trainer(tmp_path, 1, [OnlineLinearProbe()])
    run.fit(net, digits())
    value = float(run.callback_metrics["val/probe_top1"])
    (values,) = run.test(net, digits(), verbose=False)  # digits have one held-out part
    assert values == {"test/probe_top1": value, "test/probe_top5": values["test/probe_top5"]}


def test_learns_on_clean_digits_in_a_few_epochs(tmp_path: Path) -> None:
    run = trainer(tmp_path, 4, [OnlineLinearProbe()])
    run.fit(module(), digits(noise=None, epoch_length=1280))
    assert float(run.callback_metrics["val/probe_top1"]) > 0.8
    assert float(run.callback_metrics["train/probe_loss"]) < 1


class _Stop(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def _run(folder: Path, epochs: int, resume: Path | None = None, probe: bool = True):
    net = module()
    callback = OnlineLinearProbe()
    saver = ModelCheckpoint(
        folder, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=4
    )
    run = trainer(folder, 4, [*([callback] if probe else []), _Stop(epochs), saver])
    run.fit(net, digits(), ckpt_path=resume, weights_only=False if resume else None)
    return net, run, callback


@pytest.mark.parametrize("step", [12, 16])  # in the middle and at the end of an epoch of 8 steps
def test_resume_is_bit_equal(tmp_path: Path, step: int) -> None:
    whole, run, one = _run(tmp_path / "whole", 4)
    _run(tmp_path / "half", 2)
    resumed, rerun, two = _run(tmp_path / "half", 4, tmp_path / "half" / f"{step}.ckpt")
    assert rerun.global_step == run.global_step == 32
    assert_same_state(state_of(whole), state_of(resumed))
    states = [c.state_dict()["optimizer"]["state"] for c in (one, two)]
    for i, state in states[0].items():
        assert float(state["step"]) == 32
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], states[1][i][key])
    assert run.callback_metrics["val/probe_top1"] == rerun.callback_metrics["val/probe_top1"]


def test_a_new_run_after_an_evaluation_starts_a_new_optimiser(tmp_path: Path) -> None:
    """An evaluation restores the state of callbacks too; the fit after it is not that run."""
    _run(tmp_path, 1)
    callback = OnlineLinearProbe()
    run = trainer(tmp_path, 1, [callback])
    run.validate(module(), digits(), ckpt_path=tmp_path / "8.ckpt", weights_only=False, verbose=False)
    run.fit(module(), digits())
    assert {float(s["step"]) for s in callback.state_dict()["optimizer"]["state"].values()} == {8}


def test_other_classes_or_features_make_another_classifier() -> None:
    net, callback = module(), OnlineLinearProbe()
    for classes, dim in ((10, 16), (3, 16), (3, 8)):
        net._embedding_dim = dim
        callback.setup(SimpleNamespace(datamodule=SimpleNamespace(num_classes=classes)), net, "fit")
        assert net.probes["linear"].weight.shape == (classes, dim)


def test_checkpoints_load_with_and_without_the_probe(tmp_path: Path) -> None:
    _, run, _ = _run(tmp_path / "with", 1)
    value = float(run.callback_metrics["val/probe_top1"])
    validate = {"weights_only": False, "verbose": False}
    again = trainer(tmp_path, 1, [OnlineLinearProbe()])
    again.validate(module(), digits(), ckpt_path=tmp_path / "with" / "8.ckpt", **validate)
    assert float(again.callback_metrics["val/probe_top1"]) == value
    trainer(tmp_path, 1).validate(module(), digits(), ckpt_path=tmp_path / "with" / "8.ckpt", **validate)

    _run(tmp_path / "without", 1, probe=False)
    blank = trainer(tmp_path, 1, [OnlineLinearProbe()])
    with pytest.warns(UserWarning, match="holds no online linear probe"):
        blank.validate(module(), digits(), ckpt_path=tmp_path / "without" / "8.ckpt", **validate)
    assert "val/probe_top1" not in blank.callback_metrics  # an untrained probe has nothing to tell
    with pytest.warns(UserWarning, match="holds no online linear probe"):
        net, late, _ = _run(tmp_path / "later", 2, tmp_path / "without" / "8.ckpt")
    assert net.probes["linear"].weight.any()
    assert "val/probe_top1" in late.callback_metrics


def test_every_n_epochs(tmp_path: Path) -> None:
    logged: list[int] = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            if "val/probe_top1" in trainer.callback_metrics and not trainer.sanity_checking:
                logged.append(trainer.current_epoch)

    run = trainer(tmp_path, 3, [OnlineLinearProbe(every_n_epochs=2), Watch()], num_sanity_val_steps=1)
    run.fit(module(), digits())
    assert logged[0] == 1


class LossOnly(L.LightningModule):
    num_classes, embedding_dim = 10, 16

    def __init__(self) -> None:
        super().__init__()
        self.net = module()

    def embed(self, x):
        return self.net.embed(x)

    def training_step(self, batch, batch_idx):
        return self.embed(batch["image"]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.1)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose 'given' or 'clean'"):
        OnlineLinearProbe(label="noisy")
    with pytest.raises(ValueError, match="every_n_epochs is 0"):
        OnlineLinearProbe(every_n_epochs=0)
    with pytest.raises(TypeError, match="LossOnly returns none"):
        trainer(tmp_path, 1, [OnlineLinearProbe()], limit_val_batches=0).fit(LossOnly(), digits())
    zero_shot = digits()
    zero_shot.splits.zero_shot = True
    with pytest.raises(ValueError, match="use RetrievalEvaluator"):
        trainer(tmp_path, 1, [OnlineLinearProbe()]).fit(module(), zero_shot)
