"""Runs and pages of the benchmark scripts: a queue of ``nrml`` commands, and what becomes of its results.

A script says what to run and how its tables look; here stands what all of them share. A run is finished once
its folder holds ``done.json``, written last and at once, so a queue can be stopped and started again.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing as mp
import os
import re
import shlex
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
DONE = "done.json"


def parser(doc: str, name: str, methods: Collection[str], usual: Collection[str]) -> argparse.ArgumentParser:
    """The options of every script.

    Args:
        doc: its docstring. name: of the folder of its runs.
        methods: all methods. usual: those that are run unless ``--methods`` says otherwise.
    """
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--data", type=Path, default=REPO / "data")
    made.add_argument("--out", type=Path, default=REPO / "runs" / name)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--methods", nargs="+", choices=list(methods), default=list(usual))
    return made


# ---- running ---------------------------------------------------------------------------------------


def last_results(folder: Path) -> dict[str, Any]:
    """What ``nrml fit`` wrote about the run of this folder: metrics of the last and of the best epoch."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        folder: where it goes; the commands write there.
        stages: arguments of ``nrml``, a list for each command, run one after the other; or, where a peer
            trains, a function of a module and its arguments.
        result: a function of a module (it goes to another process) that is called with the folder after the
            last command; what it returns goes to ``done.json``. Its time does not count.
    """

    folder: Path
    stages: Sequence[Sequence[str] | partial[Any]]
    result: Callable[[Path], dict[str, Any]] = last_results

    @property
    def finished(self) -> bool:
        """Whether it need not be run again."""
        return (self.folder / DONE).exists()


def run_missing(jobs: Iterable[Job], out: Path, workers: int) -> None:
    """Run the jobs that are not finished, each in a process of its own, and print each when it is.

    Args:
        jobs: in the order in which they are worth having.
        out: folder that holds their folders.
        workers: how many run at a time.

    Raises:
        RuntimeError: a command failed; names the log. The jobs after it are not run.
    """
    missing = [job for job in jobs if not job.finished]
    if not missing:
        return
    import lightning_nrml.cli.app  # noqa: F401 - imported once, before the runs are forked

    os.environ["OMP_NUM_THREADS"] = "1"
    with mp.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        for folder, seconds in pool.imap_unordered(_run, missing):
            print(f"{time.strftime('%H:%M:%S')} {folder.relative_to(out)} {seconds:.0f} s", flush=True)


def _run(job: Job) -> tuple[Path, float]:
    """Run the commands of a job in this process, on one thread; their output goes to ``log.txt``."""
    import torch

    from lightning_nrml.__main__ import main as nrml

    torch.set_num_threads(1)
    folder = job.folder
    folder.mkdir(parents=True, exist_ok=True)
    commands = "".join(_shown_stage(stage) + "\n" for stage in job.stages)
    (folder / "command.txt").write_text(commands, encoding="utf-8")
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    start = time.process_time()
    for stage in job.stages:
        if isinstance(stage, partial):
            stage()
        elif nrml(list(stage)):
            raise RuntimeError(f"run failed, see {folder / 'log.txt'}")
    seconds = time.process_time() - start
    write_json(folder / DONE, {**job.result(folder), "cpu_seconds": round(seconds, 1)})
    return folder, seconds


def _shown_stage(stage: Sequence[str] | partial[Any]) -> str:
    """A line of ``command.txt``."""
    if isinstance(stage, partial):
        return f"{stage.func.__name__}({', '.join(map(repr, stage.args))})"
    return f"nrml {shlex.join(stage)}"


def write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Write a file that is there as a whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    os.replace(part, path)


# ---- publishing ------------------------------------------------------------------------------------


def shown(values: Iterable[float | None], form: str = ".3f") -> str:
    """Mean, in the given form, and standard deviation of what is known of the values."""
    known = [float(v) for v in values if v is not None and v == v]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):{form}}{deviation}"


def with_published(
    path: Path, rows: Iterable[dict[str, Any]], key: dict[str, Sequence[Any] | None]
) -> list[dict[str, Any]]:
    """The rows and, where there is none here, those of the published CSV, in the order of the tables.

    So whoever adds a seed or a method needs no copy of the runs behind the other rows. A table is made anew
    by deleting its CSV first.

    Args:
        path: the CSV; without it the rows are only sorted.
        rows: of the runs that are here; they replace published ones of the same key.
        key: columns that name a run, and the values of each in the order of the tables; ``None`` where any
            number will do. Published rows of other values are left out.
    """
    published = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            published = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    found = {tuple(row[name] for name in key): row for row in [*published, *rows]}

    def place(named: tuple[Any, ...]) -> list[Any]:
        return [v if order is None else order.index(v) for v, order in zip(named, key.values(), strict=True)]

    known = [n for n in found if all(o is None or v in o for v, o in zip(n, key.values(), strict=True))]
    return [found[named] for named in sorted(known, key=place)]


def _value(text: str) -> int | float | str | None:
    """A cell of a CSV that ``write_csv`` wrote."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def write_csv(
    path: Path, rows: Iterable[dict[str, Any]], names: Iterable[str], as_is: Collection[str] = ()
) -> None:
    """Write the rows, fractions with five digits.

    Args:
        path: the file. rows: a value for each name. names: the columns.
        as_is: columns whose numbers keep the digits that they have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        for row in rows:
            long = {k for k, v in row.items() if isinstance(v, float) and k not in as_is}
            writer.writerow({k: f"{v:.5f}" if k in long else v for k, v in row.items()})


def replace_tables(page: Path, name: str, text: str) -> None:
    """Put the text between ``<!-- name -->`` and ``<!-- end name -->`` of a page, and print it.

    Raises:
        ValueError: the page has no such markers.
    """
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    found, count = mark.subn(lambda m: f"{m[1]}\n{text}\n{m[2]}", page.read_text(encoding="utf-8"))
    if not count:
        raise ValueError(f"{page} has no markers '<!-- {name} -->' and '<!-- end {name} -->': add them.")
    page.write_text(found, encoding="utf-8")
    print(text)
