"""The callback and the verb, on a small run over digits."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import digits, module, trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_nrml.__main__ import main
from lightning_nrml.audit import AuditOptions
from lightning_nrml.callbacks import PRISM, NoiseReport
from lightning_nrml.callbacks.noise_report import embed_training_set
from lightning_nrml.cli.recipes import recipe_folder
from lightning_nrml.data import DigitsDataModule


def test_report_at_the_end_of_fit(tmp_path: Path) -> None:
    data, net = digits(), module()
    report = NoiseReport(history=1, options=AuditOptions(gallery=5))
    run = trainer(tmp_path, epochs=2, callbacks=[PRISM(warmup_steps=4), report])
    run.fit(net, data)
    folder = tmp_path / "audit"
    names = {"audit.parquet", "audit.csv", "labels_corrected.parquet", "labels_corrected.csv"}
    assert {p.name for p in folder.iterdir()} == names | {"report.html", "audit.json"}
    table = pd.read_parquet(folder / "audit.parquet")
    by_index = table.sort_values("index")
    assert by_index["times_seen"].tolist() == net.noise_ledger.seen.tolist()
    # the newest epoch only, as the ledger had it
    assert [c for c in table.columns if c.startswith("epoch_")] == ["epoch_1"]
    kept = torch.from_numpy(by_index["epoch_1"].to_numpy(copy=True))
    torch.testing.assert_close(kept, net.noise_ledger.last_score.half().float(), equal_nan=True)
    wrong = (table["label"] != table["clean_label"]).to_numpy()
    assert wrong[:300].mean() > wrong.mean() + 0.2
    assert json.loads((folder / "audit.json").read_text())["samples"] == 1297
    assert net.training
    # the embedding is that of the evaluation view, in order
    embedding, index = embed_training_set(run, net)
    assert index.tolist() == list(range(1297))
    net.eval()
    images = data.apply_views({"image": data.splits.train.images.get([3, 900])}, training=False)["image"]
    with torch.no_grad():
        torch.testing.assert_close(net.embed(images), embedding[[3, 900]], rtol=1e-4, atol=1e-5)
    again = NoiseReport(history=1)
    again.load_state_dict(report.state_dict())
    assert list(again.state_dict()["epochs"]) == [1]


def test_what_cannot_be_audited_is_refused_before_training(tmp_path: Path) -> None:
    class NoLabels(DigitsDataModule):
        train_label = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="the audit needs a datamodule of lightning_nrml"):
        trainer(tmp_path, callbacks=[NoiseReport()]).fit(module(), NoLabels(batch_size=32))
    with pytest.raises(ValueError, match="history is -1"):
        NoiseReport(history=-1)


def test_offline_wandb_run_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="audit")
    report = NoiseReport(options=AuditOptions(gallery=5))
    trainer(tmp_path, epochs=1, callbacks=[PRISM(), report], logger=logger).fit(module(), digits())
    folder = Path(logger.experiment.dir)
    logger.experiment.finish()
    tables = {}
    for path in folder.rglob("*.table.json"):
        tables[path.name.rsplit("_", 2)[0]] = json.loads(path.read_text())
    assert set(tables) == {"suspects", "confusion"}
    suspects = tables["suspects"]
    table = pd.read_parquet(tmp_path / "audit" / "audit.parquet")
    at = suspects["columns"].index("index")
    assert suspects["columns"][0] == "image"
    assert [row[at] for row in suspects["data"]] == table["index"].head(100).tolist()
    assert len(list(folder.rglob("*.png"))) == len({json.dumps(row[0]) for row in suspects["data"]})
    differ = (table["label"] != table["suggested_label"]).sum()
    assert sum(row[2] for row in tables["confusion"]["data"]) == differ


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Path:
    """One epoch of the quickstart, in ``runs/q``."""
    monkeypatch.chdir(tmp_path)
    args = ["--trainer.max_epochs=1", "--trainer.default_root_dir=runs/q", "--trainer.accelerator=cpu"]
    args.append("--model.init_args.schedule.warmup_steps=2")
    assert main(["fit", "--config", str(recipe_folder() / "quickstart.yaml"), *args]) == 0
    capfd.readouterr()
    return tmp_path / "runs" / "q"


def test_verb(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--ckpt_path", "runs/q", "--rule", "relabel", "--gallery=7"]) == 0
    out = capfd.readouterr().out
    assert "runs/q/audit/report.html" in out
    summary = json.loads((run / "audit" / "audit.json").read_text())
    assert summary["samples"] == 1297
    assert "checkpoints/" in summary["checkpoint"]
    assert "relabelled" in summary["corrected"]
    # the ledger alone
    assert main(["audit", "--ledger", "runs/q", "--out", "led"]) == 0
    assert (tmp_path / "led" / "report.html").is_file()
    capfd.readouterr()
    for args, message in (
        (["--config", "runs/q/config.yaml"], "'audit' needs --ckpt_path"),
        (["--ckpt_path", "nowhere", "--config", "runs/q/config.yaml"], "--ckpt_path nowhere finds nothing"),
        (["--ledger", "nowhere"], "--ledger nowhere finds nothing"),
        (["--ckpt_path", "runs/q", "--review", "none.csv"], "review 'none.csv' does not exist"),
        (["--ckpt_path", "runs/q", "--rule", "guess"], "rule cannot be 'guess'"),
        (["--ckpt_path", "runs/q", "--gallry", "3"], "gallry"),
    ):
        assert main(["audit", *args]) == 2
        err = capfd.readouterr().err.strip().splitlines()
        told = [line for line in err if line.startswith("nrml: ")]
        assert len(told) == 1
        assert message in told[0]
