"""MultiLabel, JoCoR and RCML: one real step equals the loss, resume is bit for bit, evaluation, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_state, state_of, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_nrml.callbacks import MultiLabelEvaluator
from lightning_nrml.data import NoiseConfig, NRMLDataModule, Split, Splits
from lightning_nrml.data.multilabel_noise import apply_multilabel_noise
from lightning_nrml.data.sources import MemorySource
from lightning_nrml.data.views import MetricView
from lightning_nrml.losses import MultiLabelJoCoRLoss, RCMLLoss
from lightning_nrml.metrics import multilabel_metrics
from lightning_nrml.modules import RCML, EmbeddingModule, JoCoR, MultiLabel
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig

LABELS = 3
MODULES: dict[str, tuple[type[EmbeddingModule], dict[str, Any]]] = {
    "bce": (MultiLabel, {}),
    "asl": (MultiLabel, {"loss": "asl"}),
    "elr": (MultiLabel, {"loss": "elr", "loss_kwargs": {"lam": 1.0}}),
    "sat": (MultiLabel, {"loss": "sat", "loss_kwargs": {"warmup_epochs": 1}}),
    "jocor": (JoCoR, {"forget_rate": 0.3, "ramp_epochs": 2}),
    "rcml": (RCML, {"keep_start": 1.0, "keep_end": 0.5, "feature_layer": "body.2", "sigma": 50.0}),
}
EVERY = pytest.mark.parametrize("name", MODULES)


class Squares(NRMLDataModule):
    """8 x 8 images; label c = a bright square in corner c."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            **{"batch_size": 16, "train_view": MetricView(8, crop_scale=None, flip=0.0), **kwargs}
        )

    def load_splits(self) -> Splits:
        g = torch.Generator().manual_seed(0)
        label = (torch.rand(144, LABELS, generator=g) < 0.4).numpy().astype(np.int64)
        pixels = torch.randint(0, 120, (144, 1, 8, 8), generator=g, dtype=torch.uint8)
        for c, (y, x) in enumerate(((0, 0), (0, 5), (5, 0))):
            pixels[label[:, c] == 1, 0, y : y + 3, x : x + 3] += 100
        parts = [
            Split(MemorySource(pixels[r]), label[r]) for r in (slice(96), slice(96, 120), slice(120, 144))
        ]
        return Splits(parts[0], parts[2], LABELS, parts[1], ["a", "b", "c"])

    def inject_noise(self, train: Split, num_classes: int) -> Any:
        return apply_multilabel_noise(train.label, self.noise)


def data(**kwargs: Any) -> Squares:
    return Squares(**{"noise": NoiseConfig("mixed", 0.3, 1), **kwargs})


def module(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    cls, own = MODULES[name]
    options: dict[str, Any] = {
        "backbone": "conv4",
        "backbone_kwargs": {"input_size": 8, "widths": [8, 16], "strides": [1, 2]},
        "in_channels": 1,
        "num_classes": LABELS,
        "optimizer": OptimizerConfig("adam", 5e-3),
        "schedule": ScheduleConfig("constant", 0),
    }
    return cls(**{**options, **own, **kwargs})


def fit(folder: Path, name: str, resume: Path | None = None) -> tuple[Any, Any]:
    net = module(name)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    run = trainer(folder, 4, [MultiLabelEvaluator(per_class=True), saver])
    run.fit(net, data(), ckpt_path=resume, weights_only=False if resume else None)
    return net, run


@EVERY
def test_learns_logs_and_resumes_bit_for_bit(tmp_path, name):
    whole, run = fit(tmp_path / "whole", name)
    logged = run.callback_metrics
    prevalence = data().splits.val.label.mean()
    assert float(logged["val/map_macro"]) > prevalence + 0.2
    assert {"val/map_micro", "val/f1_macro", "val/calibration_gap", "val/ap/a", "train/loss"} <= logged.keys()
    extra = {
        "jocor": {"train/forget_rate", "train/kept_positives"},
        "rcml": {"train/loss_1", "train/disparity"},
    }
    assert extra.get(name, set()) <= logged.keys()
    if name in extra:
        assert "val/map_micro_2" in logged
    if name == "jocor":
        assert float(logged["train/forget_rate"]) == pytest.approx(0.3)
    resumed, again = fit(tmp_path / "half", name, tmp_path / "whole" / "1.ckpt")
    assert again.global_step == run.global_step == 24
    assert_same_state(state_of(whole), state_of(resumed))
    assert float(again.callback_metrics["val/map_micro"]) == float(logged["val/map_micro"])
    if name in ("elr", "sat"):
        saved = torch.load(tmp_path / "whole" / "1.ckpt", weights_only=False)
        assert saved["state_dict"]["loss.target"].shape == (96, LABELS)
        loaded = MultiLabel.load_from_checkpoint(tmp_path / "whole" / "3.ckpt", weights_only=False)
        assert_same_state(state_of(whole), state_of(loaded))


@EVERY
def test_first_step_equals_the_loss_by_hand(tmp_path, name):
    net = module(name)
    run = trainer(tmp_path, 1, max_steps=1, limit_val_batches=0)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    run.fit(net, data())
    fresh = data()  # the fitted one would go on after the first batch
    batch = fresh.apply_views(next(iter(fresh.train_dataloader())), training=False)
    copy = module(name)
    copy.load_state_dict({k: v for k, v in start.items() if "target" not in k}, strict=False)
    x, label = batch["image"], batch["label"]
    z = copy.classifier(copy.backbone(x))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    got = float(run.callback_metrics["train/loss"])
    if name in ("bce", "sat"):
        assert got == pytest.approx(bce(z, label.float()).item(), rel=1e-5)
    if name == "elr":
        p = z.sigmoid()
        assert got == pytest.approx((bce(z, label.float()) + (1 - 0.3 * p * p).log().mean()).item(), rel=1e-5)
    if name == "jocor":
        z2 = copy.classifier_2(copy.backbone_2(x))
        j = ((z.sigmoid() - z2.sigmoid()) * (z - z2)).mean()
        want = 0.9 * (bce(z, label.float()) + bce(z2, label.float())) + 0.1 * j
        assert got == pytest.approx(want.item(), rel=1e-5)
    if name == "rcml":
        assert float(run.callback_metrics["train/disparity"]) > 0


def in_epoch(net: Any, folder: Path, epoch: int, epochs: int = 4) -> Any:
    """The net in evaluation mode, as it is in an epoch of a run."""
    net.trainer = trainer(folder, epochs)
    net.trainer.fit_loop.epoch_progress.current.completed = epoch
    return net.eval()


def some(rows: int = 12) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch, and weights that leave two of its images out."""
    g = torch.Generator().manual_seed(3)
    label = (torch.rand(rows, LABELS, generator=g) < 0.4).long()
    batch = {"image": torch.rand(rows, 1, 8, 8, generator=g), "label": label, "index": torch.arange(rows)}
    return batch, (torch.arange(rows) > 1).float()


@pytest.mark.parametrize("swap", [True, False])
def test_rcml_step_is_its_loss_with_its_settings_in_every_epoch(tmp_path, swap):
    own = {"alpha": 0.9, "beta": 0.3, "disparity_weight": 0.7, "consistency_weight": 0.4, "sigma": 2.0}
    net = module("rcml", **own, swap=swap, keep_start=1.0, keep_end=0.2, flip_rate=0.5, flip_start=2)
    assert (net.loss.alpha, net.loss.beta) == (0.9, 0.3)
    loss, (batch, weight) = RCMLLoss(**own, swap=swap), some()
    net.eval()
    torch.manual_seed(1)
    for part, backbone in ((net.classifier, net.backbone), (net.classifier_2, net.backbone_2)):
        torch.nn.init.normal_(part.weight)  # so that images differ, and the two nets disagree
        part.bias.data = -(backbone(batch["image"]) @ part.weight.T).mean(dim=0).detach()
    x, label, first = batch["image"], batch["label"], net.backbone.body[0].weight
    for epoch, rate, flip in ((0, 1.0, 0.0), (1, 0.8, 0.0), (2, 0.6, 0.5)):
        out = in_epoch(net, tmp_path, epoch).step(batch)
        got = out.loss_fn(weight)
        early = [b.body[:3](x) for b in (net.backbone, net.backbone_2)]
        z1, z2 = net.classifier(net.backbone(x)), net.classifier_2(net.backbone_2(x))
        want = loss.terms(z1, z2, label, *early, rate, weight, flip)
        for key in ("loss", "loss_1", "loss_2", "consistency", "disparity", "flipped"):
            torch.testing.assert_close(got[key], want[key], msg=f"{key} in epoch {epoch}")
        torch.testing.assert_close(
            torch.autograd.grad(got["loss"], first)[0], torch.autograd.grad(want["loss"], first)[0]
        )
        torch.testing.assert_close(out.logits, (z1 + z2) / 2)
        torch.testing.assert_close(out.embedding, net.backbone(x))
        assert epoch != 1 or not torch.equal(want["kept_1"], want["kept_2"])
    assert int(want["flipped"]) > 0
    assert module("rcml", disparity_weight=0.0, feature_layer=None).feature_layer is None


@pytest.mark.parametrize("choose", ["sample", "entry"])
def test_jocor_step_is_its_loss_with_its_settings(tmp_path, choose):
    net = module("jocor", co_lambda=0.4, forget_rate=0.5, ramp_epochs=3, exponent=0.5, choose=choose)
    batch, weight = some()
    out = in_epoch(net, tmp_path, 1).step(batch)
    got, rate = out.loss_fn(weight), 0.5 * 0.5**0.5  # half way to .5 ** .5
    z1 = net.classifier(net.backbone(batch["image"]))
    z2 = net.classifier_2(net.backbone_2(batch["image"]))
    loss = MultiLabelJoCoRLoss(0.4, choose=choose)
    want, kept = loss.terms(z1, z2, batch["label"], weight, rate)
    torch.testing.assert_close(got["loss"], want)
    assert float(got["forget_rate"]) == pytest.approx(rate)
    positive = batch["label"] > 0
    assert float(got["kept_positives"]) == pytest.approx(float(kept[positive].float().mean()))
    torch.testing.assert_close(out.logits, (z1 + z2) / 2)
    torch.testing.assert_close(out.embedding, net.backbone(batch["image"]))  # filters see the first network


def test_weights_reach_the_loss_of_one_network(tmp_path):
    batch, weight = some()
    net = in_epoch(module("bce"), tmp_path, 0)
    z = net.classifier(net.backbone(batch["image"]))
    entries = torch.nn.functional.binary_cross_entropy_with_logits(
        z, batch["label"].float(), reduction="none"
    )
    torch.testing.assert_close(net.step(batch).loss_fn(weight), entries[weight > 0].mean())
    found = net.predictions(batch["image"])
    torch.testing.assert_close(found["probability"], 1 / (1 + (-z).exp()))
    torch.testing.assert_close(
        found["embedding"], torch.nn.functional.normalize(net.backbone(batch["image"]))
    )


def test_sat_does_not_add_errors_to_the_labels(tmp_path):
    net, _ = fit(tmp_path, "sat")
    noisy, clean = data().train_label, data().train_clean_label
    seen = ~net.loss.target.isnan()
    assert seen.all(), "every training sample was visited after the warm-up"
    fixed = net.loss.corrected(noisy)
    before, after = (noisy != clean).sum().item(), (fixed != clean).sum().item()
    assert after <= before


def test_test_run_uses_the_thresholds_of_the_validation(tmp_path):
    net, run = fit(tmp_path, "bce")
    evaluator = next(c for c in run.callbacks if isinstance(c, MultiLabelEvaluator))
    fresh = MultiLabelEvaluator()
    fresh.load_state_dict(evaluator.state_dict())
    test = trainer(tmp_path, 1, [fresh])
    (got,) = test.test(net, data(), verbose=False)
    source = data()
    source.setup("test")
    batch = source.apply_views(next(iter(source.test_dataloader())), training=False)
    prob = net.eval().predictions(batch["image"])["probability"].detach()
    want = multilabel_metrics(prob, batch["label"], class_threshold=evaluator.class_threshold)
    for key in ("map_macro", "map_micro", "f1_macro", "f1_macro_tuned", "f1_micro_tuned", "calibration_gap"):
        assert got[f"test/{key}"] == pytest.approx(want[key], abs=1e-6), key
    assert fresh.best["map_macro"] == max(fresh.best["map_macro"], fresh.last["map_macro"])
    # an earlier checkpoint brings its thresholds, but not its record
    last, path = dict(fresh.last), tmp_path / "0.ckpt"
    test.test(net, data(), ckpt_path=path, weights_only=False, verbose=False)
    saved = torch.load(path, weights_only=False)["callbacks"]["MultiLabelEvaluator"]
    assert fresh.class_threshold.tolist() == saved["class_threshold"]
    assert saved["class_threshold"] != evaluator.class_threshold.tolist()
    assert fresh.last == last != saved["last"]


def saved_by(folder: Path, net: Any) -> str:
    """A Lightning checkpoint of a net."""
    run = trainer(folder, 1, limit_train_batches=1, limit_val_batches=0)
    run.fit(net, data())
    run.save_checkpoint(folder / "start.ckpt")
    return str(folder / "start.ckpt")


class _Start(Callback):
    def on_train_start(self, trainer, pl_module) -> None:
        self.state = state_of(pl_module)


def started(folder: Path, net: Any, source: Any = None) -> dict[str, torch.Tensor]:
    """The state with which a training begins."""
    start = _Start()
    trainer(folder, 1, [start], limit_train_batches=1, limit_val_batches=0).fit(net, source or data())
    return start.state


@pytest.mark.parametrize("name", ["jocor", "rcml"])
def test_start_weights_of_one_network_serve_both_and_those_of_two_each_its_own(tmp_path, name):
    whole = saved_by(tmp_path, module(name))
    saved = torch.load(whole, weights_only=False)["state_dict"]
    assert_same_state(started(tmp_path, module(name, init_weights=whole)), saved)
    torch.save({k: v for k, v in saved.items() if k.startswith("backbone.")}, tmp_path / "one.pt")
    state = started(tmp_path, module(name, init_weights=str(tmp_path / "one.pt")))
    for key, value in saved.items():
        if key.startswith("backbone."):
            assert torch.equal(state[key], value)
            assert torch.equal(state[key.replace("backbone.", "backbone_2.")], value)
    assert not torch.equal(state["classifier.weight"], state["classifier_2.weight"])


@pytest.mark.parametrize("name", ["elr", "sat"])
def test_start_weights_bring_no_targets_of_another_run(tmp_path, name):
    """They belong to its images and labels, of which there may be another number."""
    net = module(name, loss_kwargs={"warmup_epochs": 0} if name == "sat" else {})
    path = saved_by(tmp_path, net)
    assert bool((net.loss.target > 0).any())
    for rows in (96, 60):
        fewer = data()
        fewer.splits.train = fewer.splits.train.subset(np.arange(rows))
        fewer._train_keep = torch.ones(rows, dtype=torch.bool)
        state = started(tmp_path, module(name, init_weights=path), fewer)
        assert torch.equal(state["classifier.weight"], net.classifier.weight)
        empty = state["loss.target"]
        assert empty.shape == (rows, LABELS)
        assert bool((empty.isnan() if name == "sat" else empty == 0).all())


class Unvalidated(Squares):
    """Has no validation split, so the test split serves."""

    def load_splits(self) -> Splits:
        splits = super().load_splits()
        splits.val = None
        return splits


def test_thresholds_are_not_tuned_on_the_test_split(tmp_path, caplog):
    evaluator, net = MultiLabelEvaluator(), module("bce")
    trainer(tmp_path, 1, [evaluator]).fit(net, data())
    honest = evaluator.class_threshold.tolist()
    saver = ModelCheckpoint(tmp_path / "saved", "last")
    run = trainer(tmp_path, 1, [evaluator, saver])
    run.fit(module("bce"), Unvalidated())
    assert evaluator.class_threshold is None, "those of the earlier fit are not this one's"
    caplog.set_level("INFO")
    fresh = trainer(tmp_path, 1, [MultiLabelEvaluator()])
    for tester, path in ((run, None), (fresh, tmp_path / "saved" / "last.ckpt")):
        caplog.clear()
        (got,) = tester.test(net, Unvalidated(), ckpt_path=path, weights_only=False, verbose=False)
        assert "test/f1_macro" in got
        assert not [key for key in got if key.endswith("_tuned")]
        (said,) = [r.message for r in caplog.records if "f1_macro_tuned" in r.message]
        assert "validation split" in said
    # a checkpoint with thresholds keeps them, whatever it is validated and tested on
    evaluator.class_threshold = torch.tensor(honest)
    for evaluate in (run.validate, run.test):
        (got,) = evaluate(net, Unvalidated(), verbose=False)
    assert evaluator.class_threshold.tolist() == honest
    assert "test/f1_macro_tuned" in got


def test_two_networks_differ_and_each_can_be_asked():
    x = torch.rand(5, 1, 8, 8)
    for name in ("jocor", "rcml"):
        out = {e: module(name, evaluate=e).eval().predictions(x) for e in ("mean", "first", "second")}
        one, two = out["mean"]["probability_1"], out["mean"]["probability_2"]
        assert (one - two).abs().max() > 1e-3
        assert torch.equal(out["first"]["probability"], one)
        assert torch.equal(out["second"]["probability"], two)
        assert torch.equal(out["mean"]["probability"], (one + two) / 2)
        torch.testing.assert_close(out["mean"]["embedding"].norm(dim=1), torch.ones(5))
        torch.testing.assert_close(out["mean"]["embedding"], out["first"]["embedding"])
        mean = module(name, in_channels=3, channels_last=True)
        assert mean.to_backbone() is mean.backbone
        mean.setup("fit")
        assert mean.backbone_2.body[0].weight.is_contiguous(memory_format=torch.channels_last)
        second = module(name, evaluate="second").eval()
        assert second.to_backbone() is second.backbone_2
        assert torch.equal(second.embed(x), out["second"]["embedding"])
    torch.manual_seed(0)
    assert RCML("resnet10t", num_classes=2, in_channels=5).feature_layer == "layer1"


@pytest.mark.parametrize("cls", [JoCoR, RCML])
def test_a_stem_for_small_images_is_given_to_both_networks(cls: type[EmbeddingModule]) -> None:
    net = cls("resnet18", num_classes=2, in_channels=4, stem="cifar")
    for backbone in (net.backbone, net.backbone_2):
        assert (backbone.conv1.kernel_size, backbone.conv1.stride) == ((3, 3), (1, 1))
        assert backbone.conv1.in_channels == 4
    assert not torch.equal(net.backbone.conv1.weight, net.backbone_2.conv1.weight)


def test_errors_say_what_is_accepted():
    for call, words in {
        lambda: module("bce", num_classes=None): "num_classes",
        lambda: module("bce", loss="mse"): "choose one of bce, elr, sat, asl",
        lambda: module("elr", loss_kwargs={"momentum": 1}): "'momentum' is no argument of loss 'elr'.*lam",
        lambda: module("jocor", evaluate="best"): "choose mean, first or second",
        lambda: module("rcml", keep_end=0.0): "keep_end must lie",
        lambda: module("rcml", feature_layer="body.x"): "nearest: body",
        lambda: module("rcml", feature_layer=None): "set feature_layer",
        lambda: MultiLabelEvaluator(monitor="recall@1"): "choose one of map_macro",
        lambda: MultiLabelEvaluator(threshold=2): "threshold",
        lambda: MultiLabelEvaluator(every_n_epochs=0): "every_n_epochs",
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
