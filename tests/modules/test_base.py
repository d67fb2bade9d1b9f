"""The template that all methods share: step, filters, loss, log, save, hand over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from helpers import digits, module, state_of, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_nrml.callbacks import PRISM, NoiseFilterCallback, RetrievalEvaluator
from lightning_nrml.filters import FixedFilter
from lightning_nrml.modules import EmbeddingModule
from lightning_nrml.modules.base import mix_seed
from lightning_nrml.optim import ScheduleConfig
from lightning_nrml.types import Batch, FilterContext, Selection, StepOutput

TINY = {"backbone": "conv4", "backbone_kwargs": {"input_size": 8, "widths": [8], "strides": [2]}}


class Toy(EmbeddingModule):
    """A method in ten lines; ``kind`` says what its step returns."""

    def __init__(self, kind: str = "per_sample", in_channels: int = 1, **kwargs: Any) -> None:
        super().__init__(in_channels=in_channels, **{**TINY, **kwargs})
        self.kind = kind
        self.drop = nn.Dropout(0.5)
        self.weights: list[Tensor | None] = []
        self.noise: list[Tensor] = []

    def step(self, batch: Batch) -> StepOutput:
        z = self.backbone(batch["image"])
        self.noise.append(self.drop(torch.ones(8)))
        each = z.square().mean(dim=1)
        rest: dict[str, Any] = {"per_sample_loss": each}
        if self.kind == "parts":

            def loss_fn(weight: Tensor | None) -> dict[str, Tensor]:
                self.weights.append(weight)
                return {"loss": each.mean(), "pull": each.mean() * 2, "push": each.detach().mean() * 3}

            rest = {"loss_fn": loss_fn}
        elif self.kind == "nothing":
            rest = {}
        elif self.kind == "nan":
            bad = batch["index"] == batch["index"][[3]]
            z = torch.where(bad[:, None], torch.nan, z)
            rest = {"loss_fn": lambda weight: z.mean()}
        elif self.kind == "inf":
            rest = {"loss_fn": lambda weight: each.mean() / 0}
        return StepOutput(z, batch["label"], batch["index"], extras={"each": each.detach()}, **rest)


class Outputs(L.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.seen.append({**outputs, "loss": float(outputs["loss"]), "metrics": metrics})


def _mask(data: Any, share: float = 0.5) -> Tensor:
    return torch.rand(data.num_train_samples, generator=torch.Generator().manual_seed(2)) > share


# ---- the step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [False, True])
def test_per_sample_losses_are_averaged_by_weight(tmp_path: Path, filtered: bool) -> None:
    data, outputs = digits(), Outputs()
    plug = [NoiseFilterCallback(FixedFilter(_mask(data)))] if filtered else []
    trainer(tmp_path, 1, [*plug, outputs], limit_val_batches=0).fit(Toy(), data)
    for out in outputs.seen:
        each = out["extras"]["each"].double()
        assert (out["selection"] is None) is not filtered
        w = out["selection"].weight.double() if filtered else torch.ones(len(each)).double()
        assert out["loss"] == pytest.approx(float((each * w).sum() / w.sum()), rel=1e-6)
        assert out["metrics"]["train/loss"] == pytest.approx(out["loss"], rel=1e-6)
        assert out["embedding"].shape == (32, 128)
        assert not out["embedding"].requires_grad


class NaNWeights(FixedFilter):
    """Drops by NaN, which counts as 0."""

    def select(self, ctx: FilterContext) -> Selection:
        chosen = super().select(ctx)
        return replace(chosen, weight=chosen.weight.masked_fill(chosen.weight == 0, torch.nan))


def test_a_weight_that_is_nan_drops_the_sample(tmp_path: Path) -> None:
    results = []
    for kind in (FixedFilter, NaNWeights):
        torch.manual_seed(0)
        data, net = digits(), Toy()
        trainer(tmp_path, 1, [NoiseFilterCallback(kind(_mask(data)))], limit_val_batches=0).fit(net, data)
        results.append(state_of(net)["backbone.body.0.weight"])
    assert torch.equal(*results)


def test_a_dropped_sample_cannot_reach_the_weights(tmp_path: Path) -> None:
    results = []
    for spoil in (False, True):
        data = digits()
        keep = _mask(data)
        if spoil:  # other pixels in dropped images only; batch norm would see them
            data.setup("fit")
            data.splits.train.images.images[~keep] = 0
        torch.manual_seed(0)
        net = Toy()
        net.backbone.body[1] = nn.GroupNorm(2, 8)
        trainer(tmp_path, 1, [NoiseFilterCallback(FixedFilter(keep))], limit_val_batches=0).fit(net, data)
        results.append(state_of(net)["backbone.body.0.weight"])
    assert torch.equal(*results)


def test_named_parts_of_a_loss_are_logged(tmp_path: Path) -> None:
    net, outputs = Toy("parts"), Outputs()
    trainer(tmp_path, 1, [outputs], limit_val_batches=0).fit(net, digits())
    assert net.weights == [None] * 8
    for out in outputs.seen:
        assert set(out["metrics"]) == {"train/loss", "train/pull", "train/push"}
        assert out["metrics"]["train/pull"] == pytest.approx(2 * out["loss"])
        assert out["metrics"]["train/push"] == pytest.approx(3 * out["loss"])


def test_step_must_give_a_loss(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a loss_fn or a per_sample_loss"):
        trainer(tmp_path, 1).fit(Toy("nothing"), digits())
    with pytest.raises(NotImplementedError, match="EmbeddingModule must implement step"):
        trainer(tmp_path, 1).fit(EmbeddingModule(in_channels=1, **TINY), digits())


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tmp_path: Path) -> None:
    data = digits()
    data.setup("fit")
    first = list(data.train_dataloader().sampler)[:32]
    with pytest.raises(FloatingPointError, match=rf"nan at step 0: .*dataset indices \[{first[3]}\]"):
        trainer(tmp_path, 1).fit(Toy("nan"), data)
    with pytest.raises(
        FloatingPointError, match=rf"inf at step 0: all embeddings are finite.*\[{first[0]}, "
    ):
        trainer(tmp_path, 1).fit(Toy("inf"), digits())
    trainer(tmp_path, 1, limit_val_batches=0).fit(Toy("inf", check_finite=False), digits())


# ---- random numbers -----------------------------------------------------------------------------------


def test_mix_seed_tells_all_counters_apart() -> None:
    seeds = {mix_seed(s, e, b, r) for s in range(4) for e in range(6) for b in range(20) for r in range(4)}
    assert len(seeds) == 4 * 6 * 20 * 4
    assert all(0 <= s < 2**63 for s in seeds)
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(7, 0, 3, 0) == 4898159120717121642  # a resumed run must find the same draws
    high = sum(s >> 62 for s in seeds) / len(seeds)
    assert 0.4 < high < 0.6


def test_dropout_depends_on_seed_epoch_and_batch_only(tmp_path: Path) -> None:
    class Disturb(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            torch.rand(17)  # something else draws from the global generator

    runs = []
    for callbacks in ([], [Disturb()]):
        net = Toy()
        trainer(tmp_path, 2, callbacks, limit_val_batches=0).fit(net, digits())
        runs.append(torch.stack(net.noise))
    assert torch.equal(*runs)
    assert len(runs[0].unique(dim=0)) > 12  # 16 steps, 8 coins each


# ---- formats ------------------------------------------------------------------------------------------


def test_channels_last_and_compile_give_the_same_embedding(tmp_path: Path, monkeypatch) -> None:
    compiled = []

    def eager(fn, *args, **kwargs):  # traces as torch.compile does, but starts no C++ compiler
        compiled.append(fn)
        return real(fn, backend="eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", eager)
    results = []
    for options in ({}, {"channels_last": True}, {"compile_backbone": True}):
        net, data = module(schedule=ScheduleConfig("constant", 0), **options), digits()
        trainer(tmp_path, 1, limit_train_batches=2, limit_val_batches=0).fit(net, data)
        net.eval()
        image = data.splits.test.images.get(range(20))
        results.append(net.embed(torch.as_tensor(image).float() / 255).detach())
        last = net.backbone.body[3].weight.is_contiguous(memory_format=torch.channels_last)
        assert last is ("channels_last" in options)
        assert not any(k.startswith("_orig_mod") or "._orig_mod" in k for k in net.state_dict())
    assert len(compiled) == 1
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_every_precision_trains_with_a_filter(tmp_path: Path, precision: str) -> None:
    net = module()
    run = trainer(tmp_path, 1, [PRISM(0.5, similarity="vmf")], precision=precision)
    run.fit(net, digits())
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert net.filters["prism"].memory.dtype is torch.float32
    assert int(net.filters["prism"].count) > 100
    assert torch.get_default_dtype() is torch.float32


# ---- life cycle ---------------------------------------------------------------------------------------


def test_start_weights_are_used_once_and_not_on_resume(tmp_path: Path) -> None:
    torch.manual_seed(99)
    start = tmp_path / "start.pt"
    torch.save(module().backbone.state_dict(), start)
    wanted = torch.load(start)["body.0.weight"] + 1
    torch.save({**torch.load(start), "body.0.weight": wanted}, start)

    net = module(init_weights=str(start))
    assert not torch.equal(net.backbone.body[0].weight, wanted)
    begun: list[Tensor] = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            begun.append(pl_module.backbone.body[0].weight.detach().clone())

    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, 1, [saver, Look()], limit_val_batches=0).fit(net, digits())
    assert torch.equal(begun[0], wanted)
    trained = net.backbone.body[0].weight.detach().clone()
    start.unlink()
    resumed = module(init_weights=str(start))
    trainer(tmp_path, 1).fit(resumed, digits(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert torch.equal(resumed.backbone.body[0].weight, trained)
    loaded = type(net).load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    assert loaded.init_weights is None


def test_unknown_length_of_the_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"length of the run is unknown: set trainer\.max_epochs"):
        trainer(tmp_path, -1).fit(module(), digits())
    net = module(schedule=ScheduleConfig("constant", 0))
    trainer(tmp_path, -1, max_steps=3, limit_val_batches=0).fit(net, digits())
    assert int(net.trainer.global_step) == 3


def test_a_trial_of_few_steps_needs_no_shorter_warm_up(tmp_path: Path) -> None:
    net = module(schedule=ScheduleConfig("cosine", 50))
    run = trainer(tmp_path, fast_dev_run=2)
    run.fit(net, digits())
    assert run.global_step == 2
    with pytest.raises(ValueError, match="warmup_steps is 50 but the run has only 8"):
        trainer(tmp_path, 1).fit(module(schedule=ScheduleConfig("cosine", 50)), digits())


def test_keep_rate_of_the_summary_is_the_mean_of_the_epoch(tmp_path: Path) -> None:
    data, outputs = digits(), Outputs()
    run = trainer(tmp_path, 2, [NoiseFilterCallback(FixedFilter(_mask(data, 0.4))), outputs])
    run.fit(module(), data)
    steps = [float(out["selection"].keep.float().mean()) for out in outputs.seen]
    assert len(steps) == 16
    assert len(set(steps)) > 4
    for out, rate in zip(outputs.seen, steps, strict=True):
        assert out["selection"].keep.float().mean() == rate
    assert float(run.callback_metrics["train/keep_rate"]) == pytest.approx(sum(steps[8:]) / 8, abs=1e-6)
    assert not [key for key in run.callback_metrics if key.startswith("train/keep_rate_")]


def test_an_attribute_called_filters_is_refused(tmp_path: Path) -> None:
    class Clash(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.filters = nn.ModuleList([nn.Conv2d(1, 1, 1)])

    with pytest.raises(TypeError, match=r"Clash.filters is a ModuleList; noise callbacks need that name"):
        trainer(tmp_path, 1, [PRISM(0.5)]).fit(Clash(), digits())


# ---- handing over -------------------------------------------------------------------------------------


def test_to_backbone_goes_back_into_plain_timm(tmp_path: Path) -> None:
    name = "mobilenetv3_small_050"
    net = module(backbone=name, backbone_kwargs=None, in_channels=3).eval()
    torch.save(net.to_backbone().state_dict(), tmp_path / "backbone.pt")
    plain = timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(torch.load(tmp_path / "backbone.pt"))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain(x), net.backbone(x))
    again = module(
        backbone=name, backbone_kwargs=None, in_channels=3, init_weights=str(tmp_path / "backbone.pt")
    )
    assert type(again.to_backbone()) is type(plain)


def test_predictions_are_rows_with_their_index(tmp_path: Path) -> None:
    net, data = module(), digits(eval_batch_size=200)
    batches = trainer(tmp_path, 1).predict(net, data)
    assert batches is not None
    index = torch.cat([b["index"] for b in batches])
    embedding = torch.cat([b["embedding"] for b in batches])
    assert torch.equal(index, torch.arange(len(data.splits.test)))
    assert torch.equal(torch.cat([b["label"] for b in batches]), torch.as_tensor(data.splits.test.label))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(index)))
    net.eval()
    batch = data.apply_views(next(iter(data.predict_dataloader())), training=False)
    torch.testing.assert_close(net(batch["image"]), embedding[:200], rtol=1e-5, atol=1e-6)
    assert "label" not in net.predict_step({"image": batch["image"], "index": batch["index"]}, 0)


def test_without_a_seed_the_random_state_is_left_alone(monkeypatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    net = Toy()
    before = torch.get_rng_state()
    net.on_train_batch_start(None, 0)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    net.on_train_batch_start(None, 0)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_diverged_net_is_noticed_behind_a_filter(tmp_path: Path) -> None:
    """PRISM drops rows that are not finite; a batch of nothing else must not pass as a loss of 0."""
    net = module()
    with torch.no_grad():
        net.head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="embeddings are not finite for dataset indices"):
        trainer(tmp_path, 1, [PRISM(0.5)], limit_val_batches=0).fit(net, digits())


def test_sizes_name_the_argument() -> None:
    with pytest.raises(ValueError, match="memory_size is -5"):
        module(memory_size=-5)
    with pytest.raises(ValueError, match="embedding_dim is 0"):
        module(embedding_dim=0)


def test_monitor_must_be_computed() -> None:
    with pytest.raises(ValueError, match=r"monitor is 'recall@1'.*recall@5"):
        RetrievalEvaluator(ks=(5, 10))
