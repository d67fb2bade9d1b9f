"""The ramp of the assumed noise rate, and corrected labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_same_state, digits, module, state_of, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_nrml.callbacks import PRISM, KNNVote, KnownClean, NoiseFilterCallback, SmallLoss
from lightning_nrml.callbacks.noise_filter import confident_labels
from lightning_nrml.filters import FixedFilter, NoiseFilter
from lightning_nrml.memory import SampleLedger
from lightning_nrml.types import FilterContext, Selection


class Rates(Callback):
    """The filter's rate in each epoch, and what each batch was trained with."""

    def __init__(self) -> None:
        self.rate: list[float] = []
        self.changed: list[int] = []
        self.right: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 0:
            self.rate.append(next(iter(pl_module.filters.values())).noise_rate)
        given = trainer.datamodule.train_label[batch["index"]]
        changed = outputs["label"] != given
        self.changed.append(int(changed.sum()))
        self.right.append(int((outputs["label"] == batch["clean_label"])[changed].sum()))


def test_the_rate_rises_linearly_from_the_first_active_epoch(tmp_path: Path) -> None:
    rates, callback = Rates(), PRISM(0.4, start_epoch=1, ramp_epochs=2)
    options = {"limit_train_batches": 2, "limit_val_batches": 0}
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    net = module()
    trainer(tmp_path, 5, [callback, rates, saver], **options).fit(net, digits())
    assert rates.rate == pytest.approx([0, 0, 0.2, 0.4, 0.4])
    again, resumed = Rates(), module()
    run = trainer(tmp_path, 5, [PRISM(0.4, start_epoch=1, ramp_epochs=2), again], **options)
    run.fit(resumed, digits(), ckpt_path=tmp_path / "1.ckpt", weights_only=False)
    assert again.rate == pytest.approx([0.2, 0.4, 0.4])
    assert_same_state(state_of(net), state_of(resumed))


def test_the_whole_set_decision_has_the_rate_of_the_epoch_it_is_for(tmp_path: Path) -> None:
    net, data = module(), digits(m_per_class=None, epoch_length=None)
    callback = PRISM(0.5, granularity="epoch", ramp_epochs=2, max_age=0)
    trainer(tmp_path, 1, [callback], limit_val_batches=0).fit(net, data)
    judged = int((~net.noise_ledger.last_score.isnan()).sum())
    assert int((~net.noise_ledger.keep).sum()) == int(0.25 * judged)


def test_small_loss_ramps_by_itself_and_a_filter_without_a_rate_cannot(tmp_path: Path) -> None:
    assert SmallLoss(0.3).ramp_epochs == 10
    with pytest.raises(ValueError, match="ramp_epochs needs a filter with a noise_rate"):
        trainer(tmp_path, 1, [KnownClean(ramp_epochs=2)]).fit(module(), digits())
    with pytest.raises(ValueError, match="ramp_epochs is -1"):
        PRISM(ramp_epochs=-1)


# ---- corrected labels -------------------------------------------------------------------------------


class Told(NoiseFilter):
    """Scores by a fixed table (B, C); suggests its best class."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def score(self, ctx: FilterContext) -> torch.Tensor:
        return self.table.gather(1, ctx.label[:, None])[:, 0]

    def suggest(self, ctx: FilterContext) -> torch.Tensor:
        return self.table.nan_to_num(-9).argmax(1)


def test_a_suggestion_is_confident_if_it_scores_like_the_kept_rows() -> None:
    nan = torch.nan
    table = torch.tensor([[-1, -9], [-2, -9], [-3, -9], [-9, -2.0], [-9, -2.1], [nan, nan]])
    label = torch.tensor([0, 0, 0, 0, 0, 0])
    ctx = FilterContext(torch.ones(6, 2), label, torch.arange(6))
    weight = torch.tensor([1.0, 1, 1, 0, 0, 1])
    selection = Selection(weight, Told(table).score(ctx), torch.tensor(-5.0))
    # the median of the kept rows' scores is -2
    assert confident_labels(Told(table), ctx, selection).tolist() == [0, 0, -1, 1, -1, -1]
    warm_up = Selection(weight, selection.score, torch.tensor(nan))
    assert confident_labels(Told(table), ctx, warm_up).tolist() == [-1] * 6


def test_ledger_holds_corrections_only_on_demand() -> None:
    ledger = SampleLedger(4)
    assert "corrected" not in ledger.state_dict()
    with pytest.raises(RuntimeError, match="call allow_corrections"):
        ledger.correct(torch.tensor([0]), torch.tensor([1]))
    ledger.allow_corrections()
    ledger.correct(torch.tensor([2, 0, 2]), torch.tensor([3, 1, -1]))
    assert ledger.corrected.tolist() == [1, -1, -1, -1]  # the last word counts, -1 takes it back
    assert ledger.state_dict()["corrected"].tolist() == [1, -1, -1, -1]


@pytest.mark.parametrize("make", [PRISM, KNNVote])
def test_confident_labels_are_used_in_training_only_if_switched_on(tmp_path: Path, make) -> None:
    kinds, nets = [], []
    for switch in (False, True):
        rates, net = Rates(), module(embedding_dim=32)
        callback = make(noise_rate=0.5, warmup_steps=20, correct_labels=switch)
        run = trainer(tmp_path, 6, [callback, rates], limit_val_batches=0)
        run.fit(net, digits(epoch_length=1280, batch_size=64, m_per_class=8))
        kinds.append(rates)
        nets.append(net)
    off, on = kinds
    assert sum(off.changed) == 0
    assert "noise_ledger.corrected" not in nets[0].state_dict()
    assert sum(on.changed[:20]) == 0
    late = slice(-20, None)
    assert sum(on.changed[late]) > 100
    assert sum(on.right[late]) > 0.75 * sum(on.changed[late])
    # the ledger goes on speaking of given labels: corrected rows count as dropped
    ledger, data = nets[1].noise_ledger, run.datamodule
    changed = (ledger.corrected >= 0) & (ledger.corrected != data.train_label)
    assert (ledger.dropped[changed] > 0).float().mean() > 0.8
    assert data.train_is_noise[changed].float().mean() > 0.75


def test_corrections_survive_a_resume(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None):
        net = module()
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)
        callback = PRISM(0.5, warmup_steps=4, correct_labels=True)
        fit = trainer(folder, 3, [callback, saver], limit_val_batches=0)
        fit.fit(net, digits(), ckpt_path=resume, weights_only=False if resume else None)
        return net

    whole = run(tmp_path)
    assert (whole.noise_ledger.corrected >= 0).any()
    assert_same_state(state_of(whole), state_of(run(tmp_path / "again", tmp_path / "1.ckpt")))


def test_correction_needs_a_filter_that_suggests(tmp_path: Path) -> None:
    mask = torch.ones(1297, dtype=torch.bool)
    callback = NoiseFilterCallback(FixedFilter(mask), correct_labels=True)
    with pytest.raises(ValueError, match="FixedFilter does not"):
        trainer(tmp_path, 1, [callback]).fit(module(), digits())
    with pytest.raises(ValueError, match="granularity='batch' only"):
        PRISM(granularity="epoch", correct_labels=True)
