"""Our SimCLR, MoCo-v2, BYOL and SwAV beside lightly's, same data, net, views, optimiser and epochs.

    pip install "lightning-nrml[bench]"                                          # brings lightly
    python recipes/benchmarks/ssl_peer.py                                        # digits, no data needed
    python recipes/benchmarks/ssl_peer.py --data DATA --settings digits caltech101 cifar10
    python recipes/benchmarks/ssl_peer.py --data DATA --time                     # only the time of a step

Ours is one ``nrml fit`` of a recipe, as in ``ssl_table.py``; finished runs of that script (``--ours``) are
not repeated. The peer is lightly's heads, losses, prototypes, memory banks and moving averages in a plain
PyTorch loop, as lightly's examples put them together, which takes everything else from the same recipe: the
backbone with its start weights, batches, views, optimiser, schedules and sizes. Both backbones then go
through the same ``LinearProbe`` recipe. Results: ``docs/benchmarks/ssl_peer_runs.csv`` and the tables in
``docs/benchmarks.md`` between their markers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer_loop import Loop
from runner import (
    REPO,
    Job,
    parser,
    replace_tables,
    run_missing,
    shown,
    with_published,
    write_csv,
    write_json,
)
from ssl_peer_nets import PEERS, Ours, SimCLRPeer
from ssl_table import COLUMNS, METHODS, commands, measured, prepare, settings

from lightning_nrml.cli.app import NRMLCLI

SIDES = {"ours": "ours", "lightly": "lightly"}
SETTINGS = ("digits", "caltech101", "cifar10")
HEADS = {"knn_top1": "kNN top-1", "probe_top1": "linear top-1", "recall@1": "Recall@1", "map@r": "MAP@R"}


def peer_run(method: str, fit: list[str], folder: Path) -> None:
    """Train a peer by the recipe of ``fit``; writes ``backbone.pt`` and, as a fit does, ``results.json``."""
    cli = NRMLCLI(fit[1:], run=False)
    net = PEERS[method](cli.model)
    Loop(cli.datamodule, cli.model, net, cli.trainer.max_epochs).run()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.backbone.state_dict(), folder / "backbone.pt")
    cli.model.backbone.load_state_dict(net.backbone.state_dict())
    cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    last = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    write_json(folder / "results.json", {"last": last})


def job(side: str, method: str, stages: list[list[str]], folder: Path) -> Job:
    """One run of either side; ``stages``: the recipe's pretraining and its probe."""
    if side == "lightly":
        fit, probe = stages
        start = folder / "pretrain" / "backbone.pt"
        probe = [*probe[:-1], f"--model.init_args.init_weights={start}"]
        return Job(folder, [partial(peer_run, method, fit, start.parent), probe], measured)
    return Job(folder, stages, measured)


def finished(args: argparse.Namespace, side: str, setting: str, method: str, seed: int) -> Path | None:
    """The ``done.json`` of a run, of ours also from ``--ours``."""
    places = [args.out / side, *([args.ours] if side == "ours" else [])]
    found = [place / setting / method / f"seed{seed}" / "done.json" for place in places]
    return next((path for path in found if path.exists()), None)


def step_time(args: argparse.Namespace, rounds: int = 40) -> None:
    """Median CPU time of a SimCLR step of either side, in turns in one process, to ``step_time.json``."""
    torch.set_num_threads(1)
    setting = next(s for s in settings() if s.name == "caltech101")
    folder, source = args.out / "step_time", args.data / setting.source
    fit = commands(setting, "simclr", 0, folder, source, source, None)[0]
    loops = []
    for build in (Ours, SimCLRPeer):
        cli = NRMLCLI(fit[1:], run=False)
        loops.append(Loop(cli.datamodule, cli.model, build(cli.model), 12))
    batches = loops[0].batches(0)
    seconds: list[list[float]] = [[], []]
    for i in range(rounds + 3):
        batch = batches[i % len(batches)]
        views = loops[0].views(batch, 0, i)
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.process_time()
            loops[which].step(batch, views, 0)
            seconds[which].append(time.process_time() - start)
    ours, peer = (statistics.median(times[3:]) for times in seconds)
    ratio = statistics.median(a / b for a, b in zip(seconds[0][3:], seconds[1][3:], strict=True))
    found = {"ours": ours, "lightly": peer, "ratio": ratio, "rounds": rounds, "load": os.getloadavg()[0]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step_time.json").write_text(json.dumps(found))
    print(found)


def collect(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per finished run."""
    rows = []
    for setting in SETTINGS:
        for method in PEERS:
            for side in SIDES:
                for seed in range(10):
                    path = finished(args, side, setting, method, seed)
                    if path is not None:
                        done = json.loads(path.read_text(encoding="utf-8"))
                        row = {"setting": setting, "method": method, "side": side, "seed": seed}
                        rows.append(row | {key: done.get(key) for key in (*COLUMNS, "cpu_seconds")})
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Markdown table of one setting over the seeds that both sides have: mean, deviation and difference."""
    keys = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    lines = [f"**{title}**", "", f"| method | side | seeds | {' | '.join(HEADS[k] for k in keys)} |"]
    lines.append("|---" * (3 + len(keys)) + "|")
    for method in PEERS:
        by = {s: {r["seed"]: r for r in rows if (r["method"], r["side"]) == (method, s)} for s in SIDES}
        seeds = sorted(by["ours"].keys() & by["lightly"].keys())
        if not seeds:
            continue
        for side, said in SIDES.items():
            cells = [shown([by[side][seed][key] for seed in seeds]) for key in keys]
            lines.append(f"| {METHODS[method]} | {said} | {len(seeds)} | {' | '.join(cells)} |")
        gaps = [[by["ours"][s][k] - by["lightly"][s][k] for s in seeds] for k in keys]
        lines.append(f"| | ours – lightly | | {' | '.join(shown(gap, '+.3f') for gap in gaps)} |")
    return "\n".join(lines) + "\n"


def publish(args: argparse.Namespace) -> None:
    """Write the CSV and replace the tables in docs/benchmarks.md."""
    target = REPO / "docs" / "benchmarks" / "ssl_peer_runs.csv"
    key = {"setting": list(SETTINGS), "method": list(PEERS), "side": list(SIDES), "seed": None}
    rows = with_published(target, collect(args), key)
    write_csv(target, rows, [*key, *COLUMNS, "cpu_seconds"])
    titles = {setting.name: setting.title for setting in settings()}
    of = {name: [row for row in rows if row["setting"] == name] for name in SETTINGS}
    parts = [table(titles[name], of[name]) for name in SETTINGS if of[name]]
    parts.append(f"Versions: lightly {version('lightly')}, torch {version('torch')}.\n")
    page = REPO / "docs" / "benchmarks.md"
    replace_tables(page, "ssl peer tables", "\n".join(parts))
    timed = args.out / "step_time" / "step_time.json"
    if timed.exists():
        t = json.loads(timed.read_text(encoding="utf-8"))
        text = (
            f"A SimCLR step without the views, ours / lightly: {t['ratio']:.2f} (median over {t['rounds']} "
            "pairs of steps in turns in one process; batch 128, 48 pixels, one thread, CPU time; "
            f"load {t['load']:.1f} on {os.cpu_count()} cores).\n"
        )
        replace_tables(page, "ssl peer step time", text)


def main() -> None:
    """Parse arguments, run what is missing, publish."""
    options = parser(__doc__, "ssl_peer", PEERS, PEERS)
    options.add_argument("--ours", type=Path, default=REPO / "runs" / "ssl_table")
    options.add_argument("--settings", nargs="+", choices=SETTINGS, default=["digits"])
    options.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    options.add_argument("--epochs", type=int, help="pretraining epochs, for a try-out; default the recipe's")
    options.add_argument("--time", action="store_true", help="measure the time of a step, train nothing")
    args = options.parse_args()
    args.data, args.out, args.ours = args.data.resolve(), args.out.resolve(), args.ours.resolve()
    jobs = []
    for setting in settings():
        if setting.name not in args.settings or args.time:
            continue
        source = args.data / setting.source
        target = args.out / setting.prepared
        prepare(setting, source, target)
        for seed in args.seeds:
            for method in args.methods:
                for side in args.sides:
                    if finished(args, side, setting.name, method, seed) is None:
                        folder = args.out / side / setting.name / method / f"seed{seed}"
                        stages = commands(setting, method, seed, folder, source, target, args.epochs)
                        jobs.append(job(side, method, stages, folder))
    run_missing(jobs, args.out, 1)
    if args.time:
        step_time(args)
    publish(args)


if __name__ == "__main__":
    main()
