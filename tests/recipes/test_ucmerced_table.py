"""The command behind the multi-label table: its grid, arguments, means and pages."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import ucmerced_table as table
import yaml

from lightning_nrml.cli.check import check_override, load_yaml
from lightning_nrml.cli.recipes import config_arguments

REPO = Path(__file__).resolve().parents[2]


def test_the_grid_has_every_setting_once_and_the_clean_bound_once_per_seed() -> None:
    found = table.runs("", list(table.METHODS), [0, 1, 2])
    assert len(found) == len(set(found)) == 2 * (6 * 3 * (len(table.METHODS) - 1) + 3)
    assert sum(run.method == "clean" for run in found) == 2 * 3
    few = table.runs("mixed_40", ["bce", "clean"], [1], [128])
    assert {run[:3] for run in few} == {(128, "mixed", 40), (128, "none", 0)}


@pytest.mark.parametrize("size", list(table.WIDTHS))
@pytest.mark.parametrize("method", [m for m in table.METHODS if m not in table.AUDITED])
def test_commands_name_real_recipes_and_keys(method: str, size: int, tmp_path: Path) -> None:
    args = table.command(table.Run(size, "mixed", 40, method, 2), tmp_path, tmp_path / "run")
    assert {"--data.init_args.noise.rate=0.4", "--data.init_args.noise.seed=2"} <= set(args)
    (_, config), *_ = config_arguments(args)
    tree = load_yaml(Path(config))
    for word in args[1:]:
        key, _, value = word[2:].partition("=")
        if key != "config":
            assert check_override(key, value, tree) is None, word


def test_audited_labels_come_from_a_net_of_the_same_run(tmp_path: Path) -> None:
    run = table.Run(32, "mixed", 40, "cleaned_prism", 2)
    first, audit, again = table.stages(run, tmp_path, tmp_path / "run")
    noisy = table.command(run._replace(method="prism"), tmp_path, tmp_path / "run" / "first")
    assert first == [*noisy, "--trainer.enable_checkpointing=true"]
    assert audit == ["audit", f"--ledger={tmp_path}/run/first", "--rule=relabel"]
    plain = table.command(run._replace(method="bce"), tmp_path, tmp_path / "run")
    own = [a for a in again if a not in plain]
    assert own == [f"--data.init_args.noise={tmp_path}/run/first/audit_ledger/labels_corrected.csv"]
    assert {a.partition("=")[0] for a in plain if a not in again} == {
        f"--data.init_args.noise.{key}" for key in ("kind", "rate", "seed")
    }
    bce, audit, again = table.stages(run._replace(method="cleaned"), tmp_path, tmp_path / "run")
    assert f"--data.init_args.noise={tmp_path}/run/first/audit/labels_corrected.csv" in again
    assert any(a.endswith("bce_ucmerced.yaml") for a in bce)
    assert audit[1] == f"--ckpt_path={tmp_path}/run/first"
    assert table.stages(run._replace(method="elr"), tmp_path, tmp_path) == [
        table.command(run._replace(method="elr"), tmp_path, tmp_path)
    ]


def test_sweep_names_real_recipes_and_keys() -> None:
    sweep = yaml.safe_load((REPO / "recipes" / "benchmarks" / "ucmerced_sweep.yml").read_text())
    for config in sweep["parameters"].pop("config")["values"]:
        tree = load_yaml(REPO / config)
        for key, values in sweep["parameters"].items():
            assert check_override(key, str(values["values"][0]), tree) is None, key


def test_pages_hold_means_over_seeds(tmp_path: Path) -> None:
    out, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    marks = [f"ucmerced tables {size} px" for size in (32, 128)]
    (docs / "benchmarks.md").write_text(
        "a\n" + "".join(f"<!-- {mark} -->\nold\n<!-- end {mark} -->\n" for mark in marks) + "b\n"
    )
    for run, value in (
        ((32, "mixed", 40, "bce", 0), 0.5),
        ((32, "mixed", 40, "bce", 1), 0.7),
        ((32, "none", 0, "clean", 0), 0.9),
        ((128, "mixed", 40, "bce", 0), 0.8),
    ):
        folder = table.folder_of(out, table.Run(*run))
        folder.mkdir(parents=True)
        last = {"val/map_macro": value, "val/map_micro": value, "val/f1_macro": value, "val/f1_micro": value}
        (folder / "done.json").write_text(json.dumps({"last": last, "cpu_seconds": 3.0}))
    table.publish(table.collect(out), docs)
    page = (docs / "benchmarks.md").read_text()
    assert "| BCE, no defence | 2 | 0.600 ± 0.141 |" in page
    assert page.count("| BCE on clean labels (upper bound) | 1 | 0.900 |") == 1  # of this size only
    assert "| BCE, no defence | 1 | 0.800 |" in page[page.index("128 px, mixed 40 %") :]
    assert "old" not in page
    assert page.startswith("a\n")
    assert page.endswith("b\n")
    with (docs / "benchmarks" / "ucmerced_runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["size"], r["kind"], r["method"], r["seed"], r["val/map_macro"]) for r in rows] == [
        ("32", "none", "clean", "0", "0.90000"), ("32", "mixed", "bce", "0", "0.50000"),
        ("32", "mixed", "bce", "1", "0.70000"), ("128", "mixed", "bce", "0", "0.80000"),
    ]  # fmt: skip
    for size in (32, 128):
        assert (docs / "assets" / f"ucmerced_{size}px.png").stat().st_size > 5000
