"""The callback and the verb, on a small run over digits."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from google.protobuf.message import DecodeError
from helpers import digits, module, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from lightning_nrml.__main__ import main
from lightning_nrml.audit import AuditData, AuditOptions, AuditResult
from lightning_nrml.callbacks import PRISM, MultiLabelPRISM, NoiseReport
from lightning_nrml.callbacks.noise_report import embed_training_set, log_to_wandb
from lightning_nrml.cli.recipes import recipe_folder
from lightning_nrml.data import ArrayDataModule, DigitsDataModule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modules"))
from test_multilabel import data as multilabel_data
from test_multilabel import module as multilabel_module


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

    images = np.zeros((40, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", image=images, label=np.zeros(40, int), train_class=np.arange(40) < 32)
    one = ArrayDataModule(str(tmp_path / "a.npz"), batch_size=32, m_per_class=32)
    np.savez(tmp_path / "few.npz", image=images[:5], label=np.arange(5) % 2, train_class=np.arange(5) < 4)
    few = ArrayDataModule(str(tmp_path / "few.npz"), batch_size=2)
    run = trainer(tmp_path, 4, [NoiseReport()])
    with pytest.raises(ValueError, match="an audit of 5 folds needs at least as many samples, got 4"):
        run.fit(module(), few)
    assert run.global_step == 0
    with pytest.raises(ValueError, match="the labels have 1 class: an audit asks which other class"):
        trainer(tmp_path, 1, [NoiseReport()]).fit(module(), one)
    with pytest.raises(TypeError, match="the audit needs a datamodule of lightning_nrml"):
        trainer(tmp_path, callbacks=[NoiseReport()]).fit(module(), NoLabels(batch_size=32))
    with pytest.raises(ValueError, match="history is -1"):
        NoiseReport(history=-1)


def test_a_second_fit_and_a_module_of_ones_own_in_half_precision(tmp_path: Path) -> None:
    """No score of the first fit is left; images come in the weights' type."""
    report = NoiseReport(history=3)
    trainer(tmp_path / "a", 5, [PRISM(), report]).fit(module(), digits())
    assert sorted(report._epochs) == [2, 3, 4]
    trainer(tmp_path / "b", 2, [PRISM(), report]).fit(module(), digits())
    assert sorted(report._epochs) == [0, 1]

    class Own(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))

        def embed(self, image: torch.Tensor) -> torch.Tensor:
            return self.net(image)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch["image"].to(self.dtype)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    run = trainer(tmp_path / "c", 1, [NoiseReport()], precision="bf16-true", limit_val_batches=0)
    run.fit(Own(), digits())
    assert (tmp_path / "c" / "audit" / "report.html").is_file()


def test_suspects_of_wandb_are_judged_ones() -> None:
    """The others may have no image to show."""
    table = pd.DataFrame({"index": [2, 0, 1], "label": [1, 0, 1], "suggested_label": [0, 0, -1]})
    table["log_p_clean"] = [-3.0, -0.1, np.nan]
    logged: dict[str, Any] = {}
    logger = SimpleNamespace(experiment=SimpleNamespace(log=logged.update))
    asked: list[int] = []

    def images(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return np.zeros((len(rows), 1, 4, 4), dtype=np.uint8)

    data = AuditData(torch.tensor([0, 1, 1]), 2, images=images)
    result = AuditResult(table, table, 0.3, {})
    log_to_wandb(logger, result, data)  # type: ignore[arg-type]
    assert asked == [2, 0]
    assert logged["audit/confusion"].data == [[1, 0, 1]]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run's log: what ``wandb sync`` sends. A LevelDB log behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    raw, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header: padding up to the next block
            at += left
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def finished_wandb_records(path: Path) -> list[Any]:
    """All records, once the last one is on disk: W&B's process may still be writing after ``finish()``."""
    for _ in range(300):
        try:
            records = list(wandb_records(path))
        except (struct.error, ValueError, DecodeError):  # the end is half written
            records = []
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{path} was not finished within 30 seconds")


@pytest.fixture
def wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train offline with a report; what the run's artifacts hold (and where), and the scalars it logged."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))

    def train(net: Any, data: Any, noise_filter: Any) -> tuple[dict[str, Path], dict[str, str], pd.DataFrame]:
        logger = WandbLogger(save_dir=tmp_path, offline=True, project="audit")
        report = NoiseReport(options=AuditOptions(gallery=5))
        trainer(tmp_path, epochs=1, callbacks=[noise_filter, report], logger=logger).fit(net, data)
        folder = Path(logger.experiment.dir).parent
        logger.experiment.finish()
        stored: dict[str, Path] = {}  # where a file lies until it is sent
        logged: dict[str, str] = {}
        for record in finished_wandb_records(next(folder.glob("*.wandb"))):
            stored |= {e.path: Path(e.local_path) for e in record.artifact.manifest.contents}
            logged |= {"/".join(i.nested_key): i.value_json for i in record.history.item}
        return stored, logged, pd.read_parquet(tmp_path / "audit" / "audit.parquet")

    return train


def check_suspects(stored: dict[str, Path], table: pd.DataFrame, data: Any, sample: str) -> dict[str, Any]:
    """The logged suspects are the head of the table, each beside its own picture."""
    suspects = json.loads(stored["audit/suspects.table.json"].read_text())
    at, image = (suspects["columns"].index(column) for column in ("index", sample))
    assert suspects["columns"][0] == "image"
    assert [row[at] for row in suspects["data"]] == table["index"].head(100).tolist()
    for row in suspects["data"]:
        pixels = np.asarray(Image.open(stored[row[0]["path"]]))
        assert np.array_equal(pixels, data.splits.train.images.get([row[image]])[0, 0].numpy())
    return dict(suspects)


def test_offline_wandb_run_can_be_read_back(wandb_run: Any, tmp_path: Path) -> None:
    data = digits()
    stored, logged, table = wandb_run(module(), data, PRISM())
    summary = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert float(logged["audit/noise_rate"]) == pytest.approx(summary["noise_rate"], abs=1e-6)
    check_suspects(stored, table, data, "index")
    confusion = json.loads(stored["audit/confusion.table.json"].read_text())
    differ = (table["label"] != table["suggested_label"]).sum()
    assert sum(row[2] for row in confusion["data"]) == differ


def test_offline_wandb_run_of_multilabel_data_can_be_read_back(wandb_run: Any) -> None:
    data = multilabel_data()
    stored, _, table = wandb_run(multilabel_module("bce"), data, MultiLabelPRISM(warmup_steps=2))
    suspects = check_suspects(stored, table, data, "sample")
    kind, name = (suspects["columns"].index(column) for column in ("kind", "label_name"))
    assert {row[kind] for row in suspects["data"]} == {"extra", "missing"}
    assert all((row[kind] == "missing") == row[name].startswith("no ") for row in suspects["data"])
    assert "audit/confusion.table.json" not in stored
    rates = json.loads(stored["audit/label_rates.table.json"].read_text())
    found = pd.DataFrame(rates["data"], columns=rates["columns"]).set_index("label_name")
    given, wrong = data.train_label, data.train_is_noise
    by_label = (
        table.assign(doubt=1 - np.exp(table["log_p_clean"])).groupby(["position", "kind"])["doubt"].mean()
    )
    for c, label in enumerate(data.class_names):
        assert found.loc[label, "given"] == int(given[:, c].sum())
        for which, value in (("extra", 1), ("missing", 0)):
            assert found.loc[label, which] == pytest.approx(by_label[c, which], abs=1e-5)
            truth = float(wrong[given[:, c] == value, c].float().mean())
            assert found.loc[label, f"true_{which}"] == pytest.approx(truth, abs=1e-5)


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
    # train again on the corrected table
    table = "runs/q/audit/labels_corrected.csv"
    again = [f"--data.init_args.noise={table}", "--trainer.default_root_dir=runs/r"]
    again += ["--trainer.max_steps=2", "--model.init_args.schedule.warmup_steps=0"]
    assert main(["fit", "--config", str(recipe_folder() / "quickstart.yaml"), *again]) == 0
    left_out = summary["corrected"]["dropped"]
    card = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert f"label table {table}, which leaves out {left_out} samples; realised" in card
    # the path, not the file's content
    assert yaml.safe_load(Path("runs/r/config.yaml").read_text())["data"]["init_args"]["noise"] == table
    # elsewhere: all of it, and nothing in the run folder
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["audit", "--ckpt_path", "runs/q", "--out", "other", "--gallery=1"]) == 0
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert (tmp_path / "other" / "report.html").is_file()
    assert (tmp_path / "other" / "config.yaml").read_text().startswith("# written by 'nrml audit';")
    # the ledger alone, beside the other audit
    before = {p: p.read_bytes() for p in (run / "audit").iterdir()}
    assert main(["audit", "--ledger", "runs/q"]) == 0
    assert {p: p.read_bytes() for p in (run / "audit").iterdir()} == before
    assert (run / "audit_ledger" / "report.html").is_file()
    Path("other.csv").write_text("index,label,keep,mark\n3,1,1,right\n5000,1,0,wrong\n")
    assert main(["audit", "--ledger", "runs/q", "--out", "led"]) == 0
    assert (tmp_path / "led" / "report.html").is_file()
    capfd.readouterr()
    for args, message in (
        (["--config", "runs/q/config.yaml"], "'audit' needs --ckpt_path"),
        (
            ["--config", "runs/q/config.yaml", "--ckpt_path", "nowhere"],
            "--ckpt_path finds nothing: there is no run nowhere",
        ),
        (["--ledger", "nowhere"], "--ledger nowhere finds nothing"),
        (["--ckpt_path", "runs/q", "--review", "none.csv"], "review 'none.csv' does not exist"),
        (["--ckpt_path", "runs/q", "--review", "other.csv"], "review 'other.csv' names index 5000"),
        (["--ckpt_path", "runs/q", "--rule", "guess"], "rule cannot be 'guess'"),
        (["--ckpt_path", "runs/q", "--gallry", "3"], "gallry"),
    ):
        assert main(["audit", *args]) == 2
        err = capfd.readouterr().err.strip().splitlines()
        told = [line for line in err if line.startswith("nrml: ")]
        assert len(told) == 1
        assert message in told[0]
