"""The filter's life in a run: attaching, scheduling, skipping, logging, writing."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
from helpers import digits, module, state_of, trainer
from torch import Tensor

from lightning_nrml.callbacks import PRISM, KnownClean, NoiseFilterCallback
from lightning_nrml.filters import FixedFilter
from lightning_nrml.types import FilterContext, Selection


class Recorder(L.Callback):
    """Which dataset indices were forwarded, epoch by epoch, and with which weight."""

    def __init__(self) -> None:
        self.index: dict[int, list[int]] = {}
        self.dropped: dict[int, set[int]] = {}
        self.val_epochs: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.index.setdefault(trainer.current_epoch, []).extend(batch["index"].tolist())
        if outputs["selection"] is not None:
            gone = batch["index"][~outputs["selection"].keep].tolist()
            self.dropped.setdefault(trainer.current_epoch, set()).update(gone)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.val_epochs.append(trainer.current_epoch)


def test_prism_finds_wrong_labels_and_logs_its_quality(tmp_path: Path) -> None:
    net = module(embedding_dim=32, backbone_kwargs={"input_size": 8, "widths": [16, 32], "strides": [1, 2]})
    run = trainer(tmp_path, 8, [PRISM(0.5, warmup_steps=20)])
    run.fit(net, digits(epoch_length=1280, batch_size=64, m_per_class=8))
    seen = {k: float(v) for k, v in run.callback_metrics.items()}
    assert seen["noise/precision"] > 0.8  # .5 without a filter
    assert seen["noise/recall"] > 0.8
    assert seen["noise/auroc"] > 0.9
    assert 0.3 < seen["train/keep_rate"] < 0.7


def test_a_filter_that_keeps_all_does_not_change_a_bit(tmp_path: Path) -> None:
    plain, masked = module(memory_size=0), module(memory_size=0)
    trainer(tmp_path, 1).fit(plain, digits())
    data = digits()
    filter_all = NoiseFilterCallback(FixedFilter(torch.ones(data.num_train_samples, dtype=torch.bool)))
    trainer(tmp_path, 1, [filter_all]).fit(masked, data)
    for name, value in state_of(plain).items():
        assert torch.equal(value, masked.state_dict()[name]), name


@pytest.mark.parametrize("mask_value", [False, True])
def test_training_survives_batches_in_which_all_is_dropped(tmp_path: Path, mask_value: bool) -> None:
    data = digits()
    mask = torch.full((data.num_train_samples,), mask_value)
    net = module(optimizer=None)
    before = state_of(net)
    run = trainer(tmp_path, 1, [NoiseFilterCallback(FixedFilter(mask))])
    run.fit(net, data)
    assert float(run.callback_metrics["train/loss"]) >= 0
    assert int(net.memory.count) == (100 if mask_value else 0)
    moved = not torch.equal(before["head.weight"], net.state_dict()["head.weight"])
    assert moved  # weight decay moves weights even without gradient
    assert all(
        torch.isfinite(v).all() for k, v in net.state_dict().items() if k.startswith(("head", "backbone"))
    )


def test_filter_only_watches_before_its_first_epoch(tmp_path: Path) -> None:
    recorder, net = Recorder(), module()
    trainer(tmp_path, 3, [PRISM(0.5, start_epoch=2), recorder]).fit(net, digits())
    assert recorder.dropped[0] == recorder.dropped[1] == set()
    assert len(recorder.dropped[2]) > 40
    assert int(net.noise_ledger.seen.sum()) == 3 * 256
    assert int(net.filters["prism"].steps) == 24


def test_dropped_rows_never_enter_the_memory_of_the_loss(tmp_path: Path) -> None:
    data, net = digits(), module(memory_size=2000)
    trainer(tmp_path, 1, [KnownClean()]).fit(net, data)
    stored = net.memory.index[net.memory.label >= 0]
    assert len(stored) > 50
    assert not data.train_is_noise[stored].any()


def test_epoch_mode_skips_dropped_samples_before_they_are_decoded(tmp_path: Path, monkeypatch) -> None:
    recorder, data, net = Recorder(), digits(m_per_class=None, epoch_length=None), module()
    fetched: list[int] = []
    original = type(data.splits.train.images).get

    def get(self, rows):
        fetched.extend(rows)
        return original(self, rows)

    monkeypatch.setattr(type(data.splits.train.images), "get", get)
    callback = PRISM(0.5, granularity="epoch", max_age=0)
    trainer(tmp_path, 3, [callback, recorder]).fit(net, data)
    drop = ~net.noise_ledger.keep
    assert abs(int(drop.sum()) - 0.5 * data.num_train_samples) < 20
    assert len(recorder.index[0]) == 1280  # every full batch of 1297 samples
    assert len(recorder.index[1]) < 700
    assert recorder.dropped[1] == set()
    assert recorder.val_epochs == [0, 1, 2]  # a shorter epoch still ends in a validation


def test_epoch_mode_brings_stale_samples_back_with_weight_zero(tmp_path: Path) -> None:
    recorder, data, net = Recorder(), digits(m_per_class=None, epoch_length=None), module()
    trainer(tmp_path, 4, [PRISM(0.5, granularity="epoch", max_age=2), recorder]).fit(net, data)
    first = set(range(data.num_train_samples)) - set(recorder.index[1])
    back = first & set(recorder.index[3]) - set(recorder.index[2])
    assert len(back) > 100
    assert len(recorder.dropped[3] & back) > 50


def test_known_clean_by_epoch_trains_on_the_clean_subset_from_the_start(tmp_path: Path) -> None:
    recorder, data, net = Recorder(), digits(), module()
    trainer(tmp_path, 2, [KnownClean(granularity="epoch"), recorder]).fit(net, data)
    drawn = torch.tensor(recorder.index[0] + recorder.index[1])
    assert len(drawn) == 512
    assert not data.train_is_noise[drawn].any()


def test_every_n_epochs_keeps_a_decision_that_long(tmp_path: Path) -> None:
    class Decisions(L.Callback):
        keep: list[Tensor] = []  # noqa: RUF012

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            self.keep.append(pl_module.noise_ledger.keep.clone())

    seen = Decisions()
    callback = PRISM(0.5, granularity="epoch", start_epoch=1, every_n_epochs=2, max_age=1)
    trainer(tmp_path, 4, [callback, seen]).fit(module(), digits())
    assert not seen.keep[0].all()
    assert torch.equal(seen.keep[0], seen.keep[1])
    assert not torch.equal(seen.keep[1], seen.keep[2])


def test_two_filters_stack_and_need_different_names(tmp_path: Path) -> None:
    data, net = digits(), module()
    callbacks = [PRISM(0.3), KnownClean()]
    trainer(tmp_path, 2, callbacks).fit(net, data)
    assert set(net.filters) == {"prism", "knownclean"}
    dropped = net.noise_ledger.dropped
    noise = data.train_is_noise
    assert (dropped[noise] == net.noise_ledger.seen[noise]).all()
    assert dropped[~noise].sum() > 0
    with pytest.raises(ValueError, match="Two noise filters are called 'prism'"):
        trainer(tmp_path, 1, [PRISM(0.3), PRISM(0.5)]).fit(module(), digits())


def test_ledger_file_has_one_row_per_sample_most_suspicious_first(tmp_path: Path) -> None:
    data, net = digits(epoch_length=1280), module()
    trainer(tmp_path, 4, [PRISM(0.5, warmup_steps=10)]).fit(net, data)
    # names of classes are words, also those of the digits
    words = dict.fromkeys(("label_name", "suggested_name"), str)
    table = pd.read_csv(tmp_path / "noise_ledger.csv", dtype=words)
    assert sorted(table["index"]) == list(range(data.num_train_samples))
    assert (table["label"] == data.train_label[table["index"]].numpy()).all()
    wrong = (table["label"] != table["clean_label"]).to_numpy()
    assert wrong[:200].mean() > 0.75 > 0.4 > wrong[-200:].mean()
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "noise_ledger.parquet"), table, check_dtype=False
    )
    assert not list(tmp_path.glob(".*part"))


def test_decisions_do_not_depend_on_clean_labels(tmp_path: Path) -> None:
    states = []
    for scramble in (False, True):
        data, net = digits(), module()
        if scramble:
            split = data.splits.train
            split.clean_label = split.clean_label[::-1].copy()
        trainer(tmp_path, 2, [PRISM(0.5)]).fit(net, data)
        states.append(state_of(net))
    for name, value in states[0].items():
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(states[1][name])), name


class OwnModule(L.LightningModule):
    """A user's module that knows nothing of our base class."""

    num_classes, embedding_dim = 10, 16

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(64, 64),
            torch.nn.BatchNorm1d(64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 16),
        )
        self.classifier = torch.nn.Linear(16, 10)

    def training_step(self, batch, batch_idx):
        from lightning_nrml import select

        z = self.net(batch["image"])
        selection = select(self, embedding=z, label=batch["label"], index=batch["index"])
        loss = torch.nn.functional.cross_entropy(self.classifier(z), batch["label"], reduction="none")
        return (loss * selection.weight).sum() / selection.weight.sum().clamp(min=1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_users_own_module_is_filtered_through_select(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    net, data = OwnModule(), digits(epoch_length=1280, batch_size=64, m_per_class=8)
    saver = ModelCheckpoint(tmp_path, "own")
    run = trainer(tmp_path, 6, [PRISM(0.5, warmup_steps=20), saver], limit_val_batches=0)
    run.fit(net, data)
    assert float(run.callback_metrics["noise/precision"]) > 0.7
    assert int(net.filters["prism"].count) > 500
    resumed = OwnModule()
    trainer(tmp_path, 6, [PRISM(0.5, warmup_steps=20)], limit_val_batches=0).fit(
        resumed, data, ckpt_path=tmp_path / "own.ckpt", weights_only=False
    )
    assert torch.equal(resumed.classifier.weight, net.classifier.weight)
    assert int(resumed.filters["prism"].count) == int(net.filters["prism"].count)


def test_missing_sizes_are_named(tmp_path: Path) -> None:
    class Nameless(OwnModule):
        embedding_dim = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="needs `embedding_dim`"):
        trainer(tmp_path, 1, [PRISM(0.5)]).fit(Nameless(), digits())


def test_epoch_mode_without_a_mask_is_refused(tmp_path: Path) -> None:
    class Bare(L.LightningDataModule):
        num_classes, num_train_samples = 10, 64

        def train_dataloader(self):
            rows = [{"image": torch.zeros(1, 8, 8), "label": 0, "index": i} for i in range(64)]
            return torch.utils.data.DataLoader(rows, batch_size=8)

    with pytest.raises(TypeError, match="`train_keep`"):
        trainer(tmp_path, 1, [PRISM(0.5, granularity="epoch")]).fit(OwnModule(), Bare())


class BatchOnly(FixedFilter):
    granularities = ("batch",)


def test_unsupported_granularity_is_refused(tmp_path: Path) -> None:
    data = digits()
    part = BatchOnly(torch.ones(data.num_train_samples, dtype=torch.bool))
    with pytest.raises(ValueError, match="works with granularity 'batch', not 'epoch'"):
        trainer(tmp_path, 1, [NoiseFilterCallback(part, granularity="epoch")]).fit(module(), data)
    with pytest.raises(ValueError, match="every_n_epochs is 2"):
        PRISM(every_n_epochs=2)
    with pytest.raises(ValueError, match="choose 'batch' or 'epoch'"):
        PRISM(granularity="step")
    with pytest.raises(ValueError, match="needs a filter"):
        trainer(tmp_path, 1, [NoiseFilterCallback()]).fit(module(), digits())


class NanFilter(FixedFilter):
    """Has no opinion on anything."""

    def select(self, ctx: FilterContext) -> Selection:
        return Selection.keep_all(ctx.label)


def test_a_filter_without_opinions_keeps_all(tmp_path: Path) -> None:
    data, net = digits(), module()
    part = NanFilter(torch.zeros(data.num_train_samples, dtype=torch.bool))
    trainer(tmp_path, 1, [NoiseFilterCallback(part)]).fit(net, data)
    assert int(net.noise_ledger.dropped.sum()) == 0
    assert net.noise_ledger.mean_score().isnan().all()
