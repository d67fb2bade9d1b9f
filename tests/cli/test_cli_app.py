"""The command line through its real objects, with the smallest model and data."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import lightning_nrml.__main__ as entry
from lightning_nrml.callbacks.checkpoint import LastCheckpoint
from lightning_nrml.callbacks.run_card import readable
from lightning_nrml.cli import NRMLCLI
from lightning_nrml.cli.app import without_known_deprecations
from lightning_nrml.losses import MarginLoss
from lightning_nrml.modules import MetricLearning

FIT = ("fit", "--config", "tiny.yaml")


def test_print_config_round_trip(nrml, folder):
    """The printed config parses back to itself and shows our trainer defaults."""
    code, text, _ = nrml(*FIT, "--print_config")
    assert code == 0
    config = yaml.safe_load(text)
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["trainer"]["enable_model_summary"] is False
    assert config["seed_everything"] == 0
    assert config["checkpoint_best"] == {"monitor": "val/recall@1", "mode": "max", "dirpath": None}
    assert config["model"]["init_args"]["rule"] == {"lr": 0.05}
    (folder / "again.yaml").write_text(text)
    _, again, _ = nrml("fit", "--config", "again.yaml", "--print_config")
    assert yaml.safe_load(again) == config


def test_default_logger_is_offline(nrml, folder):
    """Without a word about logging, a run writes CSV into its folder."""
    text = re.sub(r"  logger: .*\n", "", (folder / "tiny.yaml").read_text())
    (folder / "tiny.yaml").write_text(text)
    _, out, _ = nrml(*FIT, "--print_config")
    assert yaml.safe_load(out)["trainer"]["logger"]["class_path"].endswith("RunCSVLogger")


def test_fit_layout_card_summary_resume_and_test(nrml, folder):
    """One run: folder, card, summary; then resume by name; then test; then start anew."""
    code, out, err = nrml(*FIT)
    assert code == 0, err
    run = folder / "runs" / "tiny"
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert files == {
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
        "results.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }
    # the card
    for text in (
        "TinyModule, 35 trainable parameters",
        "16 training samples, 7 classes",
        "symmetric, rate 0.5, seed 3; realised 25.0% wrong labels",
        "8 global",
        "4 optimiser steps = 2 epochs x 2 batches",
        "runs/tiny/config.yaml --ckpt_path last",
    ):
        assert text in out
    # the summary
    assert "Recall@1 (val/recall@1)" in out
    assert "best checkpoint  runs/tiny/checkpoints/best.ckpt (val/recall@1" in out
    assert "nrml test --config runs/tiny/config.yaml --ckpt_path best" in out
    # the resolved config, in the folder and in the logger, with what the links gave
    assert (run / "config.yaml").read_text().startswith("# written by 'nrml fit';")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["num_classes"] == 7
    assert config["model"]["init_args"]["in_channels"] == 1
    assert config["trainer"]["default_root_dir"] == "runs/tiny"
    assert yaml.safe_load((run / "hparams.yaml").read_text()) == config

    code, _, err = nrml(
        "fit", "--config", "runs/tiny/config.yaml", "--ckpt_path", "last", "--trainer.max_epochs=3"
    )
    assert code == 0, err
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    steps = [int(r["step"]) for r in rows if r["train/loss"]]
    assert steps == [0, 1, 2, 3, 4, 5]  # continued, neither deleted nor repeated
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["ckpt_path"] is None  # so that the saved config starts anew

    before = (run / "metrics.csv").read_text(), (run / "config.yaml").read_text()
    code, out, err = nrml("test", "--ckpt_path", "runs/tiny/checkpoints/best.ckpt")  # config found beside it
    assert code == 0, err
    assert "test/norm" in out
    assert ((run / "metrics.csv").read_text(), (run / "config.yaml").read_text()) == before
    assert (run / "test" / "metrics.csv").is_file()

    code, _, err = nrml(*FIT, "--trainer.max_epochs=1")
    assert code == 0, err
    assert (run / "metrics-1.csv").read_text() == before[0]
    assert len(list(csv.DictReader((run / "metrics.csv").open()))) < len(rows)


def test_last_is_not_best(nrml, folder):
    """last.ckpt follows every epoch although the monitored metric never improves."""
    code, _, err = nrml(*FIT, "--checkpoint_best.mode=min")
    assert code == 0, err
    load = {
        n: torch.load(folder / f"runs/tiny/checkpoints/{n}.ckpt", weights_only=True) for n in ("best", "last")
    }
    assert load["best"]["global_step"] == 2
    assert load["last"]["global_step"] == 4


def test_a_resumed_run_knows_the_best_of_its_last_epoch(nrml, folder, monkeypatch):
    """The best checkpoint is also that of the epoch whose end last.ckpt was written at."""
    assert nrml(*FIT)[0] == 0
    best = folder / "runs/tiny/checkpoints/best.ckpt"
    before = best.read_bytes()
    assert torch.load(best, weights_only=True)["epoch"] == 1
    rows = csv.DictReader((folder / "runs/tiny/metrics.csv").open())
    first, second = (float(row["val/recall@1"]) for row in rows if row["val/recall@1"])
    assert first < second
    between = (first + second) / 2
    monkeypatch.setattr(
        "cli_fakes.TinyModule.validation_step", lambda self, *_: self.log("val/recall@1", between)
    )
    code, _, err = nrml(*FIT, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert code == 0, err
    assert best.read_bytes() == before


def test_best_of_a_moved_run_stays_until_it_is_beaten(nrml, folder):
    """The metric rises, so under ``min`` the first epoch is the best."""
    code, _, err = nrml(*FIT, "--checkpoint_best.mode=min")
    assert code == 0, err
    (folder / "runs/tiny").rename(folder / "runs/moved")
    best = folder / "runs/moved/checkpoints/best.ckpt"
    before = best.read_bytes()
    code, _, err = nrml("fit", "--ckpt_path=runs/moved", "--trainer.max_epochs=4")
    assert code == 0, err
    assert best.read_bytes() == before
    state = torch.load(folder / "runs/moved/checkpoints/last.ckpt", weights_only=True)
    (kept,) = (v for k, v in state["callbacks"].items() if k.startswith("BestCheckpoint"))
    assert kept["best_model_path"] == str(best)
    assert state["global_step"] == 8


@pytest.mark.parametrize(
    ("monitor", "mend"),
    [
        ("val/nothing", "Log it from your module or a callback, or set checkpoint_best.monitor"),
        ("val/knn_top1", "Add the OnlineKNN callback, or set"),
    ],
)
def test_metric_that_nobody_logs(nrml, folder, caplog, monitor, mend):
    """No crash and no misleading best checkpoint, but a word about it."""
    with caplog.at_level("INFO"):
        assert nrml(*FIT, f"--checkpoint_best.monitor={monitor}")[0] == 0
    assert f"nothing logged '{monitor}'. {mend}" in caplog.text
    assert not (folder / "runs/tiny/checkpoints/best.ckpt").exists()
    assert (folder / "runs/tiny/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("given", ["--checkpoint_best.monitor=null", "--config=off.yaml"])
def test_best_checkpoint_can_be_switched_off(nrml, folder, caplog, given):
    (folder / "off.yaml").write_text("checkpoint_best: {monitor: null}")
    with caplog.at_level("INFO"):
        assert nrml(*FIT, "--trainer.default_root_dir=runs/off", given)[0] == 0
    assert "No best.ckpt" not in caplog.text
    assert [p.name for p in (folder / "runs/off/checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("key", "mend"),
    [
        ("checkpoint_best", "checkpoint_best.monitor to null"),
        ("checkpoint_last", "checkpoint_last.every_n_epochs to 0"),
        ("run_card", "run_card.show to false"),
    ],
)
def test_a_section_of_ours_that_is_null(nrml, folder, key, mend):
    (folder / "null.yaml").write_text(f"{key}: null")
    code, _, err = nrml(*FIT, "--config=null.yaml")
    assert code == 2
    assert err == f"nrml: {key} cannot be null: to do without, set {mend}.\n"


def test_the_last_epoch_is_in_the_last_checkpoint(nrml, folder):
    """Whatever lies between two checkpoints, and however the run ends."""
    last = folder / "runs/tiny/checkpoints/last.ckpt"
    stop = "{class_path: EarlyStopping, init_args: {monitor: train/loss, patience: 0, min_delta: 10}}"
    for ends, epochs in (
        (("--trainer.max_epochs=4",), 4),
        (("--trainer.max_epochs=-1", "--trainer.max_steps=5"), 3),
        (("--trainer.max_epochs=9", f"--trainer.callbacks+={stop}"), 2),
    ):
        last.unlink(missing_ok=True)
        code, _, err = nrml(*FIT, "--checkpoint_last.every_n_epochs=7", *ends)
        assert code == 0, err
        assert torch.load(last, weights_only=True)["epoch"] == epochs - 1
    last.unlink()
    assert nrml(*FIT, "--checkpoint_last.every_n_epochs=0")[0] == 0
    assert not last.exists()


@pytest.mark.parametrize(("ours", "named"), [("val/recall@1", "best"), ("null", "mine.ckpt")])
def test_the_summary_names_the_checkpoint_that_it_evaluates(nrml, folder, ours, named):
    """A callback of the user's own monitors something else, and its best epoch is another one."""
    own = "{monitor: val/recall@1, mode: min, filename: mine, enable_version_counter: false}"
    callback = f"--trainer.callbacks+={{class_path: ModelCheckpoint, init_args: {own}}}"
    code, out, err = nrml(*FIT, callback, f"--checkpoint_best.monitor={ours}")
    assert code == 0, err
    best, ckpt = (re.search(rf"{key} +(.+)", out)[1] for key in ("best checkpoint", "evaluate.*--ckpt_path"))
    assert Path(best.split()[0]).name == ("best.ckpt" if named == "best" else named)
    assert Path(ckpt).name == named
    saved = torch.load(folder / best.split()[0], weights_only=True)
    assert saved["epoch"] == (1 if named == "best" else 0)
    code, _, err = nrml("test", "--config", "runs/tiny/config.yaml", "--ckpt_path", ckpt)
    assert code == 0, err


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "val", "test")])
def test_the_summary_evaluates_on_a_split_that_exists(nrml, folder, parts):
    for part in parts:
        for label in range(2):
            (folder / "photos" / part / str(label)).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (8, 8), 90 * label + 10 * i).save(
                    folder / "photos" / part / str(label) / f"{i}.png"
                )
    config = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "callbacks": [{"class_path": "RetrievalEvaluator"}],
        },
        "model": {
            "class_path": "MetricLearning",
            "init_args": {
                "backbone": "conv4",
                "backbone_kwargs": {"input_size": 8, "widths": [4], "strides": [2]},
                "schedule": {"warmup_steps": 0},
            },
        },
        "data": {
            "class_path": "FolderDataModule",
            "init_args": {"root": "photos", "image_size": 8, "channels": 1, "batch_size": 4},
        },
    }
    (folder / "photos.yaml").write_text(yaml.safe_dump(config))
    code, out, err = nrml("fit", "--config", "photos.yaml")
    assert code == 0, err
    (command,) = re.findall(r"evaluate +nrml (.+)$", out, re.MULTILINE)
    assert command.split()[0] == ("test" if "test" in parts else "validate")
    code, _, err = nrml(*command.split())
    assert code == 0, err


def test_the_summary_names_the_limit_that_ended_the_run(nrml, folder):
    """``max_epochs N`` beside the ``max_steps`` of the config would train nothing more."""
    for ends, number, steps in (
        ((), "4", 8),
        (("--trainer.max_epochs=-1", "--trainer.max_steps=3"), "5", 5),
        (("--trainer.max_epochs=9", "--trainer.max_steps=3"), "5", 5),
    ):
        code, out, err = nrml(*FIT, *ends)
        assert code == 0, err
        (command,) = re.findall(r"train on +nrml (.+) N$", out, re.MULTILINE)
        code, _, err = nrml(*command.split(), number)
        assert code == 0, err
        saved = torch.load(folder / "runs/tiny/checkpoints/last.ckpt", weights_only=True)
        assert saved["global_step"] == steps


def test_no_best_checkpoint_without_a_validation(nrml, folder, caplog):
    """The callback that would log the metric is there, so it is not what to add."""
    args = ["--trainer.max_epochs=1", "--trainer.default_root_dir=runs/q", "--trainer.accelerator=cpu"]
    args += ["--model.init_args.schedule.warmup_steps=2", "--trainer.check_val_every_n_epoch=7"]
    with caplog.at_level("INFO"):
        assert nrml("fit", "--config", "quickstart", *args)[0] == 0
    assert "No best.ckpt was written: the run had no validation: it ended before" in caplog.text
    assert "check_val_every_n_epoch (7)" in caplog.text


def test_a_run_that_is_terminated_says_how_to_go_on(nrml, folder, monkeypatch):
    """And does not look like success to the shell."""
    real = LastCheckpoint.on_train_epoch_end

    def end(self, trainer, pl_module):
        real(self, trainer, pl_module)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_end", end)
    code, _, err = nrml(*FIT)
    assert code == 143
    assert "nrml: stopped by SIGTERM. Go on with the same command and --ckpt_path last." in err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert nrml(*FIT, "--ckpt_path=last")[0] == 0
    saved = torch.load(folder / "runs/tiny/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4


@pytest.mark.parametrize("verb", ["test", "validate", "predict", "audit", "embed", "export"])
def test_evaluation_without_checkpoint_refuses(nrml, folder, verb):
    code, _, err = nrml(verb, "--config", "tiny.yaml")
    assert code == 2
    assert err.startswith(f"nrml: '{verb}' needs --ckpt_path")
    assert len(err.strip().splitlines()) == 1
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("verb", ["fit", "test"])
@pytest.mark.parametrize("name", ["last", "best", "nowhere/x.ckpt"])
def test_missing_checkpoint_refuses(nrml, folder, verb, name):
    """Lightning's own ``fit --ckpt_path last`` would start anew in silence."""
    code, _, err = nrml(verb, "--config", "tiny.yaml", "--ckpt_path", name)
    assert code == 2
    assert f"--ckpt_path {name} finds nothing" in err
    assert len(err.strip().splitlines()) == 1


def test_test_of_the_untrained_model_must_be_asked_for(nrml):
    code, out, err = nrml("test", "--config", "tiny.yaml", "--ckpt_path", "init")
    assert code == 0, err
    assert "test/norm" in out


def instantiate(*args: str) -> NRMLCLI:
    return NRMLCLI([*args], run=False)


def test_links(folder):
    """Data tells the model; a model that does not take the arguments is left alone."""
    cli = instantiate("--config", "tiny.yaml")
    assert (cli.model.num_classes, cli.model.in_channels, cli.model.embedding_dim) == (7, 1, 4)
    other = instantiate("--config", "tiny.yaml", "--model", "cli_fakes.NoClasses", "--model.embedding_dim=6")
    assert (other.model.num_classes, other.model.in_channels, other.model.embedding_dim) == (2, 5, 6)


def test_override_order(folder):
    """Later wins: config < config < option, wherever the option stands after them; ``+=`` appends."""
    (folder / "more.yaml").write_text("trainer: {max_epochs: 7}\nmodel: {init_args: {embedding_dim: 5}}\n")
    configs = ("--config", "tiny.yaml", "--config", "more.yaml")
    cli = instantiate(*configs)
    assert (cli.trainer.max_epochs, cli.model.embedding_dim, cli.model.rule.lr) == (7, 5, 0.05)
    assert cli.run_folder == Path("runs/more")
    cli = instantiate(
        *configs,
        "--trainer.max_epochs=9",
        "--trainer.callbacks+=cli_fakes.TinyCallback",
        "--trainer.callbacks.rate=0.25",
        "--trainer.default_root_dir=here",
    )
    assert cli.trainer.max_epochs == 9
    assert [c.rate for c in cli.trainer.callbacks if type(c).__name__ == "TinyCallback"] == [0.25]
    assert cli.trainer.default_root_dir.endswith("here")
    assert cli.trainer.checkpoint_callbacks[0].dirpath.endswith("here/checkpoints")


@pytest.mark.parametrize(
    ("number", "text"),
    [(35, "35"), (3_000, "3 k"), (87_650, "87.7 k"), (99_990, "100 k"), (134_000, "0.13 M")],
)
def test_readable_count_of_parameters(number, text):
    assert readable(number) == text


def test_checkpointing_can_be_switched_off(folder):
    cli = instantiate("--config", "tiny.yaml", "--trainer.enable_checkpointing=false")
    assert cli.trainer.checkpoint_callbacks == []


def test_interpolation(folder):
    (folder / "more.yaml").write_text(
        "seed_everything: 5\ndata: {init_args: {noise: {seed: '${seed_everything}'}}}"
    )
    cli = instantiate("--config", "tiny.yaml", "--config", "more.yaml")
    assert cli.datamodule.noise.seed == 5


def test_only_the_known_deprecations_are_hidden(folder, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        instantiate("--config", "tiny.yaml")
        with without_known_deprecations():
            warnings.warn("another parameter was deprecated", DeprecationWarning, stacklevel=1)
    texts = [str(w.message) for w in caught if "eprecat" in type(w.message).__name__]
    assert [t for t in texts if "arse" in t or "v5.0.0" in t] == []
    assert "another parameter was deprecated" in texts


def test_wandb_config_and_run_id(nrml, folder, monkeypatch):
    """Offline and without an account: full flat config, and the id survives in the checkpoint."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, _, err = nrml(*FIT, "--trainer.logger=WandbLogger", "--trainer.logger.project=tiny")
    assert code == 0, err
    import wandb

    assert wandb.run.config["model.init_args.embedding_dim"] == 4
    assert wandb.run.config["trainer.max_epochs"] == 2
    assert wandb.run.name == "tiny"
    first = wandb.run.id
    wandb.finish()
    assert (folder / "runs/tiny/wandb").is_dir()
    code, _, err = nrml(
        "fit", "--config", "runs/tiny/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=3"
    )
    assert code == 0, err
    assert wandb.run.id == first
    wandb.finish()
    assert (
        yaml.safe_load((folder / "runs/tiny/config.yaml").read_text())["trainer"]["logger"]["init_args"]["id"]
        is None
    )


def test_shipped_quickstart_end_to_end(nrml, folder):
    """The real recipe by its name, cut to two epochs: data -> filter -> model -> metrics -> folder."""
    code, out, err = nrml(
        "fit",
        "--config",
        "quickstart",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    )
    assert code == 0, err
    assert "MetricLearning" in out
    assert "prism" in out
    assert "symmetric, rate 0.5" in out
    run = folder / "runs" / "quickstart"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["num_classes"] == 10
    assert config["model"]["init_args"]["in_channels"] == 1
    results = json.loads((run / "results.json").read_text())
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["RetrievalEvaluator"]
    for which in ("last", "best"):  # as computed, not rounded to float32
        assert {f"val/{k}": v for k, v in state[which].items() if k != "epoch"}.items() <= results[
            which
        ].items()
        assert results[which]["val/num_queries"] > 0
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/keep_rate"} <= set(header)
    code, _, err = nrml("test", "--config", "runs/quickstart/config.yaml", "--ckpt_path", "last")
    assert code == 0, err


def test_margin_loss_by_its_name_learns_a_boundary_per_class(nrml, folder):
    """Its recipe, cut to a few steps: short name, own learning rate, a checkpoint that rebuilds it."""
    code, _, err = nrml(
        "fit",
        "--config",
        "margin_digits",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=6",
        "--model.init_args.schedule.warmup_steps=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    )
    assert code == 0, err
    path = folder / "runs" / "margin_digits" / "checkpoints" / "last.ckpt"
    loss = MetricLearning.load_from_checkpoint(path).loss
    assert isinstance(loss, MarginLoss)
    moved = (loss.beta.detach() - 1.2).abs()  # Adam: about the learning rate at each of six steps
    assert moved.shape == (10,)
    assert 1e-3 < float(moved.min()) <= float(moved.max()) < 0.06
    assert len(set(moved.tolist())) > 1


@pytest.mark.parametrize(
    "given",
    [
        ["--data.init_args.train_view.init_args.mean", "null"],
        ["--data.train_view.mean=null"],
        ["--data.init_args.train_view.init_args={mean: null, std: [0.5]}"],
    ],
)
def test_null_for_an_argument_of_a_view(nrml, folder, given):
    (folder / "d.yaml").write_text(
        "data:\n  class_path: DigitsDataModule\n  init_args:\n    train_view: {class_path: MetricView, "
        "init_args: {size: 8, mean: [0.1], std: [0.2]}}\nmodel: {class_path: MetricLearning}\n"
    )
    code, text, err = nrml("fit", "--config", "d.yaml", *given, "--print_config")
    assert code == 0, err
    view = yaml.safe_load(text)["data"]["init_args"]["train_view"]["init_args"]
    assert view["mean"] is None
    assert view["std"] == ([0.5] if "0.5" in given[0] else [0.2])


def test_the_result_says_what_a_probe_reached(nrml):
    """Of the last epoch, which is the one to report; the best checkpoint's line has the best."""
    short = {"max_epochs": 1, "limit_train_batches": 2, "check_val_every_n_epoch": 1, "accelerator": "cpu"}
    options = [f"--trainer.{key}={value}" for key, value in short.items()]
    code, out, err = nrml("fit", "--config", "ssl/linear_probe_digits", *options)
    assert code == 0, err
    row = next(line for line in out.splitlines() if "linear probe top-1 (val/probe_top1)" in line)
    assert 0 < float(row.split("│")[2]) < 1


def test_a_finished_run_keeps_its_results_when_it_is_resumed(nrml, folder):
    """As a job that is submitted again does."""
    code, _, err = nrml("fit", "--config", "tiny.yaml")
    assert code == 0, err
    results = folder / "runs" / "tiny" / "results.json"
    before = results.read_text()
    assert json.loads(before)["last"]
    code, _, err = nrml("fit", "--config", "runs/tiny/config.yaml", "--ckpt_path", "last")
    assert code == 0, err
    assert results.read_text() == before
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "3"]
    code, _, err = nrml("fit", "--config", "runs/tiny/config.yaml", *more)
    assert code == 0, err
    assert json.loads(results.read_text())["steps"] > json.loads(before)["steps"]


def test_a_saved_config_after_the_checkpoint_does_not_start_anew(nrml, folder):
    """It holds ``ckpt_path: null``, and later arguments win."""
    assert nrml(*FIT)[0] == 0
    last = folder / "runs" / "tiny" / "checkpoints" / "last.ckpt"
    before = torch.load(last, weights_only=True)["global_step"]
    config = ["--config", "runs/tiny/config.yaml", "--trainer.max_epochs=3"]
    code, _, err = nrml("fit", "--ckpt_path", "last", *config)
    assert code == 0, err
    after = list(csv.DictReader((folder / "runs" / "tiny" / "metrics.csv").open()))
    assert [int(row["step"]) for row in after if row["train/loss"]] == list(range(6))  # one run, continued
    assert before == 4
    assert torch.load(last, weights_only=True)["global_step"] == 6
    code, _, err = nrml("test", "--ckpt_path", "best", *config)
    assert code == 0, err


def test_what_the_command_line_changed_is_shown_and_kept(nrml, folder):
    inline = "run_card: {show: true}\nseed_everything: 3"  # a line break must not end the comment
    args = (*FIT, "--trainer.max_epochs=1", "--model.init_args.rule.lr", "0.01", "--config", inline)
    code, out, err = nrml(*args)
    assert code == 0, err
    assert "trainer.max_epochs=1, model.init_args.rule.lr=0.01" in out
    text = (folder / "runs" / "tiny" / "config.yaml").read_text()
    command = next(line for line in text.splitlines() if line.startswith("# command: nrml fit"))
    assert shlex.split(command.partition("nrml ")[2])[:5] == list(args[:5])
    assert yaml.safe_load(text)["seed_everything"] == 3

    code, out, err = nrml("fit", "--config", "runs/tiny/config.yaml")
    assert code == 0, err
    assert "changed" not in out


def test_a_number_of_classes_that_the_data_overrule_is_said(nrml, folder):
    """But not a default: of the three channels that modules expect nobody has spoken."""
    with pytest.warns(UserWarning, match="model.num_classes: 12 in the config, 7 in the data") as seen:
        code, _, err = nrml(*FIT, "--model.init_args.num_classes=12", "--trainer.max_epochs=1")
    assert code == 0, err
    assert not [w for w in seen if "in_channels" in str(w.message)]
    saved = yaml.safe_load((folder / "runs" / "tiny" / "config.yaml").read_text())["model"]["init_args"]
    assert (saved["num_classes"], saved["in_channels"]) == (7, 1)
    with pytest.warns(UserWarning, match="model.in_channels: 4 in the config, 1 in the data"):
        nrml(*FIT, "--model.init_args.in_channels=4", "--trainer.max_epochs=1")


def test_exit_code_reaches_who_replaced_sys_exit(monkeypatch):
    """W&B does so in a run, and calls it finished if the code of a failed run does not come by."""
    seen = []

    def failing_run():
        monkeypatch.setattr(sys, "exit", seen.append)
        return 2

    monkeypatch.setattr(entry, "main", failing_run)
    with contextlib.suppress(SystemExit):
        sys.exit(entry.script())  # as the installed command does
    assert seen == [2]


@pytest.mark.parametrize(("end", "text"), [("max_epochs=2", "Epoch 1/1"), ("max_steps=3", "Epoch 1 ")])
def test_the_bar_counts_to_no_epoch_where_steps_end_the_run(nrml, folder, end, text):
    """Lightning's says ``Epoch 1/-2`` there."""
    config = (folder / "tiny.yaml").read_text().replace("  enable_progress_bar: false\n", "")
    (folder / "tiny.yaml").write_text(config.replace("  max_epochs: 2\n", ""))
    code, out, err = nrml(*FIT, f"--trainer.{end}")
    assert code == 0, err
    assert text in out + err
    assert "/-2" not in out + err


def test_a_new_run_puts_the_checkpoints_of_an_earlier_one_aside(nrml, folder, caplog):
    """Else its ``best`` would be a model of other settings; one that fails at its start changes nothing."""
    here = folder / "runs/tiny/checkpoints"
    assert nrml(*FIT)[0] == 0
    old = {name: (here / f"{name}.ckpt").read_bytes() for name in ("best", "last")}
    fails = ["--model=cli_fakes.Failing", "--model.init_args.at=on_train_start"]
    with pytest.raises(RuntimeError, match="failed at start"):
        nrml(*FIT, *fails)
    assert old == {name: (here / f"{name}.ckpt").read_bytes() for name in old}

    never = ["--trainer.check_val_every_n_epoch=5", "--model.init_args.rule.lr=0.5"]
    with caplog.at_level("INFO"):
        assert nrml(*FIT, *never)[0] == 0
    assert "earlier run in this folder is now " in caplog.text
    assert "runs/tiny/checkpoints/previous/best.ckpt." in caplog.text
    assert old == {name: (here / f"previous/{name}.ckpt").read_bytes() for name in old}
    code, _, err = nrml("test", "--config", "tiny.yaml", "--ckpt_path", "best")
    assert code == 2
    assert "best.ckpt does not exist (that folder has last.ckpt)" in err

    kept = (here / "last.ckpt").read_bytes()
    assert nrml(*FIT, "--ckpt_path=last", "--trainer.max_epochs=3")[0] == 0  # the same run
    assert old == {name: (here / f"previous/{name}.ckpt").read_bytes() for name in old}
    assert torch.load(here / "last.ckpt", weights_only=True)["global_step"] == 6
    copy = folder / "elsewhere.ckpt"
    copy.write_bytes(kept)
    assert nrml(*FIT, f"--ckpt_path={copy}", "--trainer.max_epochs=4")[0] == 0  # one that branches off
    assert torch.load(here / "previous/last.ckpt", weights_only=True)["global_step"] == 6
