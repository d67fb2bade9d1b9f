"""Where commands write: into the run folder that was asked for, and into no other."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_nrml.cli.errors import UserError
from lightning_nrml.cli.run_folder import FolderClaim

FIT = ("fit", "--config", "tiny.yaml")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def as_saved_before(config: Path, root: str) -> None:
    """Give a saved config the places in it that earlier versions wrote down."""
    tree = yaml.safe_load(config.read_text())
    for key in ("checkpoint_last", "checkpoint_best"):
        tree[key]["dirpath"] = f"{root}/checkpoints"
    tree["trainer"]["logger"]["init_args"]["save_dir"] = root
    config.write_text(yaml.safe_dump(tree))


def test_a_saved_config_in_another_folder_leaves_the_first_run_alone(nrml, folder):
    assert nrml(*FIT)[0] == 0
    first = folder / "runs/tiny"
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["checkpoint_last"]["dirpath"] is None
    assert saved["checkpoint_best"]["dirpath"] is None
    assert saved["trainer"]["logger"]["init_args"]["save_dir"] is None
    refit = ("fit", "--config", "runs/tiny/config.yaml", "--model.init_args.embedding_dim=5")
    for root, old in (("runs/other", False), ("runs/third", True)):
        if old:
            as_saved_before(first / "config.yaml", "runs/tiny")
        before = contents(first)
        code, _, err = nrml(*refit, f"--trainer.default_root_dir={root}")
        assert code == 0, err
        assert contents(first) == before
        assert contents(folder / root).keys() == before.keys()
    code, _, err = nrml(
        "fit", "--config", "runs/third/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=3"
    )
    assert code == 0, err
    assert (folder / "runs/third/metrics.csv").read_text().count("\n") > before["metrics.csv"].count(b"\n")
    assert not (folder / "runs/third/metrics-1.csv").exists()


def test_a_place_that_was_given_is_kept(nrml, folder):
    """In the run and in its saved config."""
    code, _, err = nrml(*FIT, "--checkpoint_last.dirpath=elsewhere", "--trainer.logger.save_dir=curves")
    assert code == 0, err
    assert (folder / "elsewhere/last.ckpt").is_file()
    assert (folder / "runs/tiny/checkpoints/best.ckpt").is_file()
    assert (folder / "curves/metrics.csv").is_file()
    saved = yaml.safe_load((folder / "runs/tiny/config.yaml").read_text())
    assert saved["checkpoint_last"]["dirpath"] == "elsewhere"
    assert saved["trainer"]["logger"]["init_args"]["save_dir"] == "curves"


HOOKS = ("setup", "configure_optimizers", "validation_step", "on_train_start", "training_step")


def test_a_run_that_fails_at_its_start_leaves_the_earlier_one_alone(nrml, folder):
    """Config, hyperparameters and metrics of the run that was there, whatever fails, anew or resumed."""
    assert nrml(*FIT)[0] == 0
    before = contents(folder / "runs/tiny")
    for hook in HOOKS:
        with pytest.raises(RuntimeError, match="failed at start"):
            nrml(*FIT, "--model=cli_fakes.Failing", f"--model.at={hook}")
        assert contents(folder / "runs/tiny") == before, hook
    failing = ("--model=cli_fakes.Failing", "--model.at=on_train_start", "--trainer.max_epochs=3")
    with pytest.raises(RuntimeError, match="failed at start"):
        nrml(*FIT, "--ckpt_path=last", *failing)
    assert contents(folder / "runs/tiny") == before
    evaluate = ("test", "--config", "runs/tiny/config.yaml", "--ckpt_path=last")
    assert nrml(*evaluate)[0] == 0
    before = contents(folder / "runs/tiny")
    with pytest.raises(RuntimeError, match="failed at start"):
        nrml(*evaluate, "--model=cli_fakes.Failing", "--model.at=test_step")
    assert contents(folder / "runs/tiny") == before


@pytest.mark.parametrize(
    "more", [("--trainer.max_epochs=0",), ("--trainer.limit_train_batches=0",), ("--ckpt_path=last",)]
)
def test_a_run_that_trains_nothing_leaves_the_earlier_one_alone(nrml, folder, more):
    assert nrml(*FIT)[0] == 0
    run = folder / "runs/tiny"
    before = contents(run)
    assert b'"train/loss"' in before["results.json"]
    code, _, err = nrml(*FIT, *more)
    assert code == 0, err
    assert contents(run) == before


def test_what_is_logged_before_the_first_batch_is_kept(nrml, folder):
    """The files wait, the numbers do not get lost."""
    code, _, err = nrml(*FIT, "--trainer.callbacks+=cli_fakes.EarlyLog")
    assert code == 0, err
    rows = list(csv.DictReader((folder / "runs/tiny/metrics.csv").open()))
    assert [row["early"] for row in rows if row["early"]] == ["0.25"]
    assert yaml.safe_load((folder / "runs/tiny/hparams.yaml").read_text())["early"] == 1


def test_a_run_named_by_its_folder(nrml, folder):
    """Also after it was moved: the outputs go where the run is now, and nowhere else."""
    assert nrml(*FIT)[0] == 0
    for old in (False, True):
        home = folder / f"runs/moved{old:d}"
        (folder / "runs/tiny").rename(home)
        if old:
            as_saved_before(home / "config.yaml", "runs/tiny")
        code, out, err = nrml("test", "--ckpt_path", f"runs/{home.name}")
        assert code == 0, err
        assert "test/norm" in out
        assert (home / "test/metrics.csv").is_file()
        code, _, err = nrml("validate", f"--ckpt_path=runs/{home.name}/checkpoints/last.ckpt")
        assert code == 0, err
        assert (home / "validate/metrics.csv").is_file()
        assert not (folder / "runs/tiny").exists()
        home.rename(folder / "runs/tiny")
    best = torch.load(folder / "runs/tiny/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    code, out, err = nrml("test", "--config=tiny.yaml", "--ckpt_path=runs/tiny")
    assert code == 0, err
    shown = float(re.findall(r"test/norm\D+([\d.]+)", out)[0])
    assert shown == pytest.approx(float(best["layer.weight"].square().mean()))
    # going on is from the last one, in place
    last = folder / "runs/tiny/checkpoints/last.ckpt"
    before = torch.load(last, weights_only=True)["global_step"]
    code, _, err = nrml("fit", "--ckpt_path", "runs/tiny", "--trainer.max_epochs=3")
    assert code == 0, err
    assert torch.load(last, weights_only=True)["global_step"] == before * 3 // 2


@pytest.mark.parametrize("verb", ["test", "validate", "predict", "audit", "embed", "export"])
@pytest.mark.parametrize("config", [(), ("--config", "tiny.yaml")])
def test_a_run_that_is_not_there(nrml, folder, verb, config):
    (folder / "runs/empty/checkpoints").mkdir(parents=True)
    told = {
        "runs/nonesuch": "there is no run runs/nonesuch.",
        "runs/nonesuch/checkpoints/best.ckpt": "best.ckpt does not exist"
        if config
        else "there is no file runs/",
        "runs/empty": "runs/empty has no checkpoint yet",
    }
    for value, words in told.items():
        code, _, err = nrml(verb, *config, "--ckpt_path", value)
        assert code == 2
        assert words in err
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "place", "option"),
    [
        (FIT, "runs/tiny/checkpoints", "--checkpoint_last.dirpath"),
        ((*FIT, "--checkpoint_best.dirpath=a/b"), "a", "--checkpoint_best.dirpath"),
        (("test", "--ckpt_path=runs/done"), "runs/done/test", "--trainer.default_root_dir"),
        (("predict", "--ckpt_path=runs/done"), "runs/done/predict", "--trainer.default_root_dir"),
        (("audit", "--ckpt_path=runs/done"), "runs/done/audit", "--trainer.default_root_dir"),
        (("audit", "--ckpt_path=runs/done", "--out=x/y"), "x", "--out"),
        (("embed", "--ckpt_path=runs/done", "--out=x/y"), "x", "--out"),
        (("export", "--ckpt_path=runs/done", "--out=x/y/net.onnx"), "x", "--out"),
    ],
)
def test_a_file_in_the_way_is_told_before_anything_is_built(nrml, folder, monkeypatch, args, place, option):
    assert nrml(*FIT, "--trainer.default_root_dir=runs/done")[0] == 0
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text("mine")
    monkeypatch.setattr("cli_fakes.TinyData.__init__", lambda *_: pytest.fail("data were built"))
    code, _, err = nrml(*args)
    assert code == 2
    assert f"{place} is a file; name another place with {option}." in err
    assert len(err.strip().splitlines()) == 1
    assert (folder / place).read_text() == "mine"


def test_a_file_in_the_way_of_what_needs_no_model(nrml, folder):
    (folder / "mine").write_text("mine")
    ledger = "index,rank,label,suggested_label,mean_log_p_clean,times_seen,times_dropped,keep\n"
    (folder / "noise_ledger.csv").write_text(ledger + "0,1,0,1,-2.0,3,2,False\n1,2,1,1,-0.1,3,0,True\n")
    for args in (
        ("audit", "--ledger", "noise_ledger.csv", "--out", "mine/x"),
        ("recipes", "cp", "quickstart", "mine/x.yaml"),
        ("inject", "--config", "quickstart", "--out", "mine/x.csv"),
    ):
        code, _, err = nrml(*args)
        assert code == 2
        assert err.startswith("nrml: the folder mine")
        assert "mine is a file; name another place" in err
        assert len(err.strip().splitlines()) == 1


def test_two_runs_do_not_train_in_one_folder(nrml, folder, monkeypatch):
    """The second one is refused, and nothing of the first is touched; once that has ended, it may."""
    assert nrml(*FIT)[0] == 0
    before, other = contents(folder / "runs/tiny"), FolderClaim()
    other.take(folder / "runs/tiny")
    told = "another run is training in runs/tiny now, and would share checkpoints"
    for more in ((), ("--ckpt_path=last", "--trainer.max_epochs=3")):
        code, _, err = nrml(*FIT, *more)
        assert code == 2
        assert told in err
        assert contents(folder / "runs/tiny") == before
    assert nrml("test", "--ckpt_path=runs/tiny")[0] == 0
    other.release()
    assert nrml(*FIT)[0] == 0
    other.take(folder / "runs/tiny")  # a run that has ended holds nothing
    other.release()

    # both were started before there was a folder
    start = "cli_fakes.TinyModule.on_train_start"
    monkeypatch.setattr(start, lambda self: other.take(folder / "runs/new"), raising=False)
    code, _, err = nrml(*FIT, "--trainer.default_root_dir=runs/new")
    assert code == 2
    assert told.replace("tiny", "new") in err
    assert contents(folder / "runs/new") == {}
    with pytest.raises(UserError, match="another run"):
        FolderClaim().take(folder / "runs/new")
    other.release()


def test_a_run_that_fails_gives_its_folder_back(nrml, folder):
    assert nrml(*FIT)[0] == 0
    with pytest.raises(RuntimeError, match="failed at start"):
        nrml(*FIT, "--model=cli_fakes.Failing", "--model.at=on_train_epoch_end")
    assert nrml(*FIT)[0] == 0
