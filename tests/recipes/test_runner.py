"""What the benchmark scripts share: the queue of runs, and the pages made of their results."""

from __future__ import annotations

import csv
import json
import math
import os
from functools import partial
from pathlib import Path

import noise_settings
import noise_table
import pytest
import ssl_table
from runner import (
    Job,
    last_results,
    replace_tables,
    run_missing,
    shown,
    with_published,
    write_csv,
    write_json,
)

import lightning_nrml.cli.app

SETTING = next(s for s in noise_table.settings(Path("data")) if s.name == "digits_50")


@pytest.fixture
def nrml(monkeypatch) -> None:
    """In place of the command line: the argument is the folder of the run, or asks for a failure."""

    def run(args: list[str]) -> int:
        os.write(1, f"running {args}\n".encode())
        if args[0] == "fail":
            return 1
        write_json(Path(args[1]) / "results.json", {"last": {"val/map@r": 0.5}, "best": {}})
        return 0

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(lightning_nrml.cli.app, "run", run)


def probed(folder: Path) -> dict[str, float]:
    assert not (folder / "done.json").exists(), "a run is done after its result"
    return {"map@r": last_results(folder)["last"]["val/map@r"]}


def peer(folder: Path, word: str) -> None:
    folder.mkdir()
    (folder / "weights").write_text(word)


@pytest.mark.usefixtures("nrml")
def test_a_peer_is_a_stage_among_commands(tmp_path) -> None:
    folder = tmp_path / "run"
    job = Job(folder, [partial(peer, folder / "peer", "seen"), ["fit", str(folder)]])
    run_missing([job], tmp_path, 1)
    assert (folder / "peer" / "weights").read_text() == "seen"
    assert last_results(folder)["last"] == {"val/map@r": 0.5}
    assert (folder / "command.txt").read_text() == f"peer({folder / 'peer'!r}, 'seen')\nnrml fit {folder}\n"


@pytest.mark.usefixtures("nrml")
def test_missing_runs_are_run_and_finished_ones_left_alone(tmp_path, capsys) -> None:
    old, new, two = (Job(tmp_path / name, [["fit", str(tmp_path / name)]]) for name in ("old", "new", "two"))
    old.folder.mkdir()
    write_json(old.folder / "done.json", {"last": {}})
    # of several commands, and with a result of its own
    two = Job(two.folder, [["fit", str(two.folder), "a b"], ["fit", str(two.folder)]], probed)
    run_missing([old, new, two], tmp_path, 2)

    assert [job.finished for job in (old, new, two)] == [True, True, True]
    assert os.listdir(old.folder) == ["done.json"]
    assert json.loads((old.folder / "done.json").read_text()) == {"last": {}}
    done = json.loads((new.folder / "done.json").read_text())
    assert (done["last"], done["best"], done["cpu_seconds"] >= 0) == ({"val/map@r": 0.5}, {}, True)
    assert json.loads((two.folder / "done.json").read_text()).keys() == {"map@r", "cpu_seconds"}
    written = {"command.txt", "done.json", "log.txt", "results.json"}
    assert set(os.listdir(two.folder)) == written, "no parts of files are left"
    assert (two.folder / "command.txt").read_text() == (
        f"nrml fit {two.folder} 'a b'\nnrml fit {two.folder}\n"
    )
    assert (two.folder / "log.txt").read_text().count("running") == 2
    said = sorted(line.split()[1] for line in capsys.readouterr().out.splitlines())
    assert said == ["new", "two"]
    run_missing([old, new, two], tmp_path, 2)
    assert capsys.readouterr().out == "", "nothing is left to run"


@pytest.mark.usefixtures("nrml")
def test_a_failing_run_names_its_log_and_is_not_finished(tmp_path) -> None:
    folder = tmp_path / "bad"
    job = Job(folder, [["fit", str(folder)], ["fail"], ["fit", str(folder), "never"]])
    with pytest.raises(RuntimeError, match=r"run failed, see .*bad/log\.txt"):
        run_missing([job], tmp_path, 1)
    assert not job.finished
    assert (folder / "log.txt").read_text() == f"running {job.stages[0]}\nrunning ['fail']\n"


def queued(monkeypatch, script, *words: str) -> dict[str, Job]:
    """What a script would run for a command line, by name below ``--out``."""
    found: dict[str, Job] = {}

    def keep(jobs: list[Job], out: Path, workers: int) -> None:
        found.update({job.folder.relative_to(out).as_posix(): job for job in jobs})

    monkeypatch.setattr("sys.argv", [script.__name__, *words])
    monkeypatch.setattr(script, "run_missing", keep)
    monkeypatch.setattr(script, "publish", lambda *args: None)
    script.main()
    return found


def test_frozen_runs_are_judged_before_they_are_done(tmp_path, monkeypatch) -> None:
    words = ["--only", "digits", "--methods", "none", "frozen", "--seeds", "7", "--out", str(tmp_path)]
    jobs = queued(monkeypatch, noise_table, *words)
    settings = ("digits_50", "digits_20", "digits_cluster")
    assert list(jobs) == [
        f"{setting}/{method}/seed7" for setting in settings for method in ("none", "frozen")
    ]
    plain, frozen = jobs["digits_50/none/seed7"], jobs["digits_50/frozen/seed7"]
    assert plain.result is last_results
    assert frozen.result is noise_table.judged
    assert frozen.stages == [noise_settings.command(SETTING, "frozen", 7, frozen.folder)]
    judged: list[Path] = []
    monkeypatch.setattr(noise_table, "judge_run", judged.append)
    frozen.folder.mkdir(parents=True)
    write_json(frozen.folder / "results.json", {"last": {}})
    assert frozen.result(frozen.folder) == {"last": {}}
    assert judged == [frozen.folder]


def test_a_pretraining_and_its_probe_are_one_run(tmp_path, monkeypatch) -> None:
    words = ["--methods", "pixels", "byol", "--seeds", "7", "--out", str(tmp_path)]
    jobs = queued(monkeypatch, ssl_table, *words)
    assert {name: len(job.stages) for name, job in jobs.items()} == {
        "digits/pixels/seed7": 1,
        "digits/byol/seed7": 2,
    }
    job = jobs["digits/byol/seed7"]
    (job.folder / "probe").mkdir(parents=True)
    write_json(job.folder / "probe" / "results.json", {"last": {"val/probe_top1": 0.9, "val/other": 1.0}})
    assert job.result(job.folder) == {"probe_top1": 0.9}, "of pixels and a random backbone"
    (job.folder / "pretrain").mkdir()
    write_json(job.folder / "pretrain" / "results.json", {"last": {"val/knn_top1": 0.8, "train/loss": 1.0}})
    assert job.result(job.folder) == {"knn_top1": 0.8, "probe_top1": 0.9}


def test_means_of_what_is_known() -> None:
    assert shown([0.5, None, math.nan, 0.7]) == "0.600 ± 0.141"
    assert shown([0.25]) == "0.250"
    assert shown([None, math.nan]) == "–"


def test_csv_and_tables(tmp_path) -> None:
    rows = [{"seed": 1, "top1": 0.5, "lr": 3e-4}, {"seed": 2, "top1": None, "lr": 0.0}]
    path = tmp_path / "new" / "runs.csv"
    write_csv(path, rows, ["seed", "top1", "lr"], as_is=["lr"])
    with path.open() as file:
        assert list(csv.reader(file)) == [
            ["seed", "top1", "lr"],
            ["1", "0.50000", "0.0003"],
            ["2", "", "0.0"],
        ]
    page = tmp_path / "page.md"
    text = "a\n<!-- ssl tables -->\nold\n<!-- end ssl tables -->\nb\n<!-- x -->\nx\n<!-- end x -->\n"
    page.write_text(text)
    replace_tables(page, "ssl tables", "| \\1 |\n")
    replaced = text.replace("old\n", "\n| \\1 |\n\n")
    assert page.read_text() == replaced
    with pytest.raises(ValueError, match=r"page.md has no markers '<!-- y tables -->'"):
        replace_tables(page, "y tables", "new")
    assert page.read_text() == replaced


def test_published_rows_stay_where_there_is_no_run(tmp_path) -> None:
    """A new run replaces the row of its key, another finds its place."""
    path, names = tmp_path / "runs.csv", ("method", "rate", "seed", "map", "note")
    first = [("a", 0.5, 0, 0.25, None), ("b", 0.5, 0, 0.125, "x"), ("b", 0.5, 10, math.nan, "y")]
    write_csv(path, [dict(zip(names, row, strict=True)) for row in first], names, as_is=("rate",))
    here = [("b", 0.5, 0, 0.75, "new"), ("a", 0.5, 2, 0.5, "added"), ("b", 0.1, 0, 0.5, None)]
    key = {"method": ["b", "a"], "rate": None, "seed": None}
    rows = with_published(path, [dict(zip(names, row, strict=True)) for row in here], key)
    assert [tuple(row.values()) for row in rows if row["map"] == row["map"]] == [
        ("b", 0.1, 0, 0.5, None),
        ("b", 0.5, 0, 0.75, "new"),
        ("a", 0.5, 0, 0.25, None),
        ("a", 0.5, 2, 0.5, "added"),
    ]
    assert [row["seed"] for row in rows if row["map"] != row["map"]] == [10]
    assert [row["method"] for row in with_published(path, [], {**key, "method": ["a"]})] == ["a"]
    assert with_published(tmp_path / "none.csv", [{"method": "a", "rate": 1, "seed": 0}], key)
