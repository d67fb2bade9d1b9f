"""Where commands write: into the run folder that was asked for, and into no other."""

from __future__ import annotations

from pathlib import Path

import yaml

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
