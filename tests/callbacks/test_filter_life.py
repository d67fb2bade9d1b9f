"""Filters beyond one fit: again, on other data, without their callback, stacked, copied, resumed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import digits, module, state_of, trainer

from lightning_nrml import select
from lightning_nrml.callbacks import PRISM, Consensus, KNNVote, KnownClean, NoiseFilterCallback
from lightning_nrml.data import NoiseConfig
from lightning_nrml.filters import FixedFilter


class Watch(L.Callback):
    """The share of kept rows of every step (None: nobody decided), and what is in force in each epoch."""

    def __init__(self) -> None:
        self.kept: list[float | None] = []
        self.in_force: list[torch.Tensor] = []
        self.logged: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if hasattr(pl_module, "noise_ledger"):
            self.in_force.append(pl_module.noise_ledger.keep.clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        selection = outputs["selection"]
        self.kept.append(None if selection is None else float(selection.keep.float().mean()))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def mask_of(data) -> FixedFilter:
    return FixedFilter(~data.train_is_noise)


@pytest.mark.parametrize("same", [True, False])
def test_every_fit_begins_with_a_new_filter_and_ledger(tmp_path: Path, same: bool) -> None:
    net, data, first = module(), digits(), PRISM(0.5)
    run = trainer(tmp_path, 2, [first])
    run.fit(net, data)
    run.validate(net, data, verbose=False)
    trainer(tmp_path, 1, [first if same else PRISM(0.5, memory_size=64)]).fit(net, data)
    assert int(net.filters["prism"].steps) == 8
    assert int(net.noise_ledger.seen.sum()) == 256
    if not same:
        assert net.filters["prism"].memory_size == 64


def test_a_filter_object_of_ones_own_goes_on(tmp_path: Path) -> None:
    net, data = module(), digits()
    trainer(tmp_path, 1, [PRISM(0.5)]).fit(net, data)
    part = net.filters["prism"]
    for _ in range(2):
        trainer(tmp_path, 1, [NoiseFilterCallback(part)]).fit(net, data)
    assert int(part.steps) == 3 * 8


def test_without_its_callback_a_filter_takes_no_part(tmp_path: Path) -> None:
    watch, net, data = Watch(), module(), digits()
    trainer(tmp_path, 1, [PRISM(0.5, granularity="epoch")]).fit(net, data)
    seen = int(net.noise_ledger.seen.sum())
    assert "filters.prism.memory" in net.state_dict()  # to be looked at and saved
    assert data.train_keep.all()  # the sampler draws everything again
    trainer(tmp_path, 1, [watch]).fit(net, data)
    assert watch.kept == [None] * 8
    assert int(net.noise_ledger.seen.sum()) == seen
    # nor on other data, beside another filter
    fewer = digits(test_size=1000)
    trainer(tmp_path, 1, [NoiseFilterCallback(mask_of(fewer), name="mask")]).fit(net, fewer)
    assert list(net.filters) == ["mask"]
    assert net.noise_ledger.num_samples == fewer.num_train_samples
    assert not hasattr(net, "feature_bank")


def test_a_fit_that_broke_off_leaves_nothing_switched_on(tmp_path: Path) -> None:
    class Break(L.Callback):
        def on_train_batch_end(self, *args) -> None:
            raise RuntimeError("broken off")

    watch, net, data = Watch(), module(), digits()
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(tmp_path, 1, [PRISM(0.5), Break()]).fit(net, data)
    trainer(tmp_path, 1, [watch]).fit(net, data)
    assert watch.kept == [None] * 8
    trainer(tmp_path, 1, [PRISM(0.5)]).fit(net, data)
    assert int(net.filters["prism"].steps) == 8


def test_by_epoch_the_quality_is_that_of_the_whole_sets_decision(tmp_path: Path) -> None:
    watch, data = Watch(), digits()
    trainer(tmp_path, 3, [PRISM(0.5, granularity="epoch"), watch]).fit(module(), data)
    noise = data.train_is_noise
    for keep, logged in zip(watch.in_force, watch.logged, strict=True):
        assert logged["train/keep_rate"] == pytest.approx(float(keep.float().mean()))
        assert logged["noise/precision"] == pytest.approx(float((keep & ~noise).sum() / keep.sum()))
        assert logged["noise/recall"] == pytest.approx(float((keep & ~noise).sum() / (~noise).sum()))
    assert watch.in_force[0].all()
    assert not watch.in_force[1].all()
    assert 0.5 < watch.logged[-1]["noise/auroc"] < 1


@pytest.mark.parametrize("make", [PRISM, KNNVote, Consensus])
def test_by_epoch_warm_up_keeps_everything(tmp_path: Path, make) -> None:
    for steps, all_kept in ((17, True), (4, False)):
        net = module()
        trainer(tmp_path, 2, [make(warmup_steps=steps, granularity="epoch")]).fit(net, digits())
        assert bool(net.noise_ledger.keep.all()) == all_kept, steps


def test_stacked_filters_each_tell_their_own(tmp_path: Path) -> None:
    """Threshold, rate and suggestions do not depend on which filter comes first."""
    data = digits()
    for order in (0, 1):
        mask, net = NoiseFilterCallback(mask_of(data), name="mask"), module()
        filters = [mask, PRISM(0.5), Consensus(warmup_steps=2), KNNVote(k=5, noise_rate=0.5)]
        run = trainer(tmp_path, 1, filters[:: 1 - 2 * order], log_every_n_steps=1)
        run.fit(net, data)
        logged = run.callback_metrics
        assert {f"{n}/threshold" for n in ("prism", "consensus", "knnvote")} <= set(logged)
        assert "mask/threshold" not in logged  # it has none
        assert float(logged["consensus/threshold"]) == pytest.approx(-0.6931, abs=1e-4)
        assert "noise/estimated_rate" in logged
        assert (net.noise_ledger.suggested >= 0).sum() > 100
        dropped = data.train_is_noise & (net.noise_ledger.seen > 0)
        assert net.noise_ledger.last_score[dropped].isneginf().all()  # a finite one would not add up


def test_known_clean_knows_the_data_of_this_run(tmp_path: Path) -> None:
    oracle = KnownClean()
    for seed in (0, 1):
        run = trainer(tmp_path, 1, [oracle])
        run.fit(module(), digits(noise=NoiseConfig("symmetric", 0.5, seed)))
        assert float(run.callback_metrics["noise/precision"]) == 1
        assert float(run.callback_metrics["noise/recall"]) == 1


def test_a_filtered_module_can_be_copied_and_pickled(tmp_path: Path) -> None:
    net = module()
    blank = copy.deepcopy(net)
    trainer(tmp_path, 1, [PRISM(0.5, granularity="epoch")]).fit(net, digits())
    fitted = state_of(net)
    blank.load_state_dict(fitted)  # drops what the copy, not the original, has no owner for
    again = pickle.loads(pickle.dumps(net))
    for name, value in again.state_dict().items():
        assert torch.equal(value, fitted[name]) or (value.isnan() == fitted[name].isnan()).all(), name


def test_a_filter_may_begin_with_a_resumed_run(tmp_path: Path) -> None:
    plain = trainer(tmp_path, 1)
    plain.fit(module(), digits())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    net = module()
    run = trainer(tmp_path, 2, [PRISM(0.5)])
    with pytest.warns(UserWarning, match=r"no state of filters.prism, noise_ledger: .* starts anew"):
        run.fit(net, digits(), ckpt_path=tmp_path / "plain.ckpt", weights_only=False)
    assert int(net.filters["prism"].steps) == 8
    with pytest.raises(RuntimeError, match="Missing key"):  # of the module itself nothing may be absent
        net.load_state_dict({k: v for k, v in net.state_dict().items() if k != "head.weight"})


def test_labels_of_any_integer_type(tmp_path: Path) -> None:
    net = module()
    trainer(tmp_path, 1, [PRISM(0.5), Consensus(warmup_steps=2)]).fit(net, digits())
    for part in net.filters.values():
        net.filters.mode[type(part).__name__.lower()] = "batch"
    net.train()
    z, label, index = torch.randn(8, 16), torch.arange(8) % 4, torch.arange(8)
    long = select(net, embedding=z, label=label, index=index)
    short = select(net, embedding=z, label=label.int(), index=index.int())
    assert torch.equal(long.weight, short.weight)
    net.filters.commit()
