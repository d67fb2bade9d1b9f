"""Label-level weights (B, L) on the contract: the chain, the ledger and the quality take them as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import assert_same_state, state_of, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_nrml.callbacks import NoiseFilterCallback
from lightning_nrml.filters import FixedFilter, NoiseFilter
from lightning_nrml.filters.chain import FilterChain
from lightning_nrml.memory import LabelLedger
from lightning_nrml.types import FilterContext, Selection

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modules"))
from test_multilabel import LABELS, data, module


class Table(NoiseFilter):
    """Weights and scores by index from given tables ``(N, L)``."""

    def __init__(self, weight: torch.Tensor, score: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("known", torch.log(weight * 0.8 + 0.1) if score is None else score)

    def score(self, ctx: FilterContext) -> torch.Tensor:
        return self.known[ctx.index]

    def select(self, ctx: FilterContext) -> Selection:
        return Selection(self.weight[ctx.index], self.score(ctx), torch.tensor(-0.5))


def context(n: int = 5) -> FilterContext:
    label = (torch.arange(n * LABELS).view(n, LABELS) % 2).long()
    return FilterContext(torch.zeros(n, 2), label, torch.arange(n))


def test_decisions_on_samples_hold_for_all_of_their_labels() -> None:
    chain, weight = FilterChain(), torch.rand(5, LABELS)
    chain["table"], chain["list"], chain["pass"] = Table(weight), FixedFilter([1, 0, 1, 1, 0]), Table(weight)
    chain.mode = {"table": "batch", "list": "batch", "pass": "epoch"}
    chain.epoch_keep["pass"] = lambda: torch.tensor([True, True, False, True, True])
    found = chain.select(context())
    wanted = weight * torch.tensor([1.0, 0, 0, 1, 0])[:, None]
    assert torch.equal(found.weight, wanted)
    assert (found.score[1] < -1e38).all()
    torch.testing.assert_close(found.score[0], torch.log(weight[0] * 0.8 + 0.1))
    assert found.rows(slice(3, 5)).weight.shape == (2, LABELS)


@pytest.mark.parametrize("name", ["bce", "asl", "elr", "sat", "jocor", "rcml"])
def test_dropped_labels_teach_nothing_whatever_they_are(tmp_path: Path, name: str) -> None:
    weight = (torch.rand(96, LABELS, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    states = []
    for turned in (False, True):
        source, net = data(), module(name)
        if turned:
            label = source.splits.train.label
            label[(weight == 0).numpy()] = 1 - label[(weight == 0).numpy()]
        run = trainer(tmp_path, 2, [NoiseFilterCallback(Table(weight))], limit_val_batches=0)
        run.fit(net, source)
        states.append({k: v for k, v in state_of(net).items() if not k.startswith("noise_ledger")})
    if name == "sat":  # entries that were never told of hold nothing
        assert states[0]["loss.target"].isnan().equal(weight == 0)
    assert_same_state(*states)
    assert isinstance(net.noise_ledger, LabelLedger)
    assert torch.equal(net.noise_ledger.label_dropped, (2 * (weight == 0)).to(torch.int16))


def test_weights_of_nan_count_as_dropped(tmp_path: Path) -> None:
    weight = torch.ones(96, LABELS)
    weight[:, 1] = torch.nan
    nets = []
    for w in (weight, weight.nan_to_num(0.0)):
        nets.append(module("bce"))
        filters = [NoiseFilterCallback(Table(w, torch.zeros(96, LABELS)))]
        trainer(tmp_path, 1, filters, limit_val_batches=0).fit(nets[-1], data())
    assert torch.equal(nets[0].classifier.weight, nets[1].classifier.weight)
    assert (nets[0].noise_ledger.label_dropped[:, 1] == 1).all()


def test_a_run_in_which_all_is_dropped_goes_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, 1, [NoiseFilterCallback(Table(torch.zeros(96, LABELS)))], limit_val_batches=0)
    net = module("bce")
    run.fit(net, data())
    assert float(run.callback_metrics["train/loss"]) == 0
    assert float(run.callback_metrics["train/keep_rate"]) == 0
    assert all(p.isfinite().all() for p in net.parameters())


def test_quality_of_both_kinds_is_logged_and_files_name_the_labels(tmp_path: Path) -> None:
    source = data()
    wrong, given = source.train_is_noise, source.train_label
    weight = (~wrong).float()
    weight[:10] = 1.0  # ten samples' errors are missed
    weight[10:14, 0] = 0.0  # and up to four right labels dropped
    run = trainer(tmp_path, 1, [NoiseFilterCallback(Table(weight))], limit_val_batches=0)
    net = module("bce")
    run.fit(net, source)
    seen = {k: float(v) for k, v in run.callback_metrics.items()}
    dropped = weight == 0
    for kind, value in (("missing", 0), ("extra", 1)):
        own = given == value
        caught = (dropped & wrong & own).sum()
        assert seen[f"noise/{kind}_precision"] == pytest.approx(float(caught / (dropped & own).sum()))
        assert seen[f"noise/{kind}_recall"] == pytest.approx(float(caught / (wrong & own).sum()))
    assert seen["train/keep_rate"] == pytest.approx(float(weight.mean()))
    assert seen["noise/auroc"] > seen["noise/recall"] * 0.5
    whole = pd.read_parquet(tmp_path / "noise_ledger_labels.parquet")
    assert len(whole) == dropped.numel()
    assert (whole["index"] * LABELS + whole["label"]).is_unique
    assert whole["keep"][int(dropped.sum()) :].all()
    table = pd.read_csv(tmp_path / "noise_ledger_labels.csv")  # for people: what was ever dropped
    assert len(table) == int(dropped.sum())
    assert table["rank"].tolist() == list(range(1, len(table) + 1))
    at = table["index"].to_numpy(), table["label"].to_numpy()
    assert dropped.numpy()[at].all()
    assert (table["given"] == given.numpy()[at]).all()
    assert (table["clean"] == source.train_clean_label.numpy()[at]).all()
    assert (table["kind"] == table["given"].map({0: "missing", 1: "extra"})).all()
    assert table["label_name"].tolist() == ["abc"[i] for i in at[1]]
    assert not table["keep"].any()
    samples = pd.read_csv(tmp_path / "noise_ledger.csv", keep_default_na=False).set_index("index")
    fixed = given.bool() ^ dropped
    for i in (0, 12, 50, 95):
        assert samples.loc[i, "label"] == ";".join("abc"[c] for c in given[i].nonzero().flatten())
        assert samples.loc[i, "suggested_label"] == ";".join("abc"[c] for c in fixed[i].nonzero().flatten())


def test_the_ledger_resumes_bit_for_bit(tmp_path: Path) -> None:
    weight = (torch.rand(96, LABELS, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    states = []
    for resume in (None, tmp_path / "0.ckpt"):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)
        net = module("bce")
        run = trainer(tmp_path, 3, [NoiseFilterCallback(Table(weight)), saver], limit_val_batches=0)
        run.fit(net, data(), ckpt_path=resume, weights_only=False if resume else None)
        states.append(state_of(net))
    assert_same_state(*states)
    assert int(net.noise_ledger.seen.sum()) == 3 * 96
    assert "noise_ledger.label_score_sum" in states[0]


def test_corrections_are_refused(tmp_path: Path) -> None:
    class Suggests(Table):
        def suggest(self, ctx: FilterContext) -> torch.Tensor:
            return ctx.label

    part = NoiseFilterCallback(Suggests(torch.ones(96, LABELS)), correct_labels=True)
    with pytest.raises(ValueError, match="not with multi-label data"):
        trainer(tmp_path, 1, [part]).fit(module("bce"), data())
