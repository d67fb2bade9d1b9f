"""Remake the noise tables of docs/benchmarks.md: every method, data set, rate and seed, then the tables.

    python recipes/benchmarks/noise_table.py --data DATA --jobs 2

Each run is exactly one ``nrml fit`` command (kept in its run folder as ``command.txt``). Finished runs are
not repeated, so the command can be stopped and started again; ``--only caltech101`` and ``--seeds 0``
narrow it. Results: ``docs/benchmarks/noise_runs.csv`` (one row per run) and the tables in
``docs/benchmarks.md`` between their markers.
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
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
METHODS = {
    "none": "no filter",
    "prism_avg": "PRISM AvgSim",
    "prism_vmf": "PRISM vMF-Sim, a kappa per class",
    "prism_vmf_shared": "PRISM vMF-Sim, one kappa",
    "known_clean": "known clean (upper bound)",
    "cross_entropy": "cross-entropy, no filter",
    "combined": "contrastive + 0.3 cross-entropy, no filter",
    "combined_prism": "contrastive + 0.3 cross-entropy + PRISM AvgSim",
    "consensus": "contrastive + 0.3 cross-entropy + Consensus (not told the rate)",
}
UNFILTERED = ("none", "known_clean", "cross_entropy", "combined")
COLUMNS = ("val/recall@1", "val/map@r", "noise/precision", "noise/recall", "noise/auroc")


@dataclass(frozen=True)
class Setting:
    """One data set at one noise rate."""

    name: str
    title: str
    recipe: str
    rate: float
    warmup: int
    classes: int
    dim: int
    noise: str  # override that sets the noise of a seed; {data} and {seed} are filled in
    fixed: tuple[str, ...] = ()
    group: str = field(default="")


def settings(data: Path) -> list[Setting]:
    """All settings, the quick and the central ones first."""
    omniglot = (
        f"--data.init_args.path={data}/omniglot/omniglot.npz",
        f"--model.init_args.init_weights={data}/omniglot/simclr_start.npz",
    )
    caltech = (f"--data.init_args.path={data}/caltech101_dml/caltech101_dml_96.npz",)
    cifar = (
        f"--data.init_args.path={data}/cifar10n/cifar10n_jpeg.npz",
        "--data.init_args.epoch_length=24960",  # 390 steps in all: one pass over the images
        "--trainer.max_epochs=2",
    )
    listed = "--data.init_args.noise_list=noise_lists.npz:given_r{rate}_s{seed}"
    found = [
        Setting(
            "digits_50", "scikit-learn digits, 50 % symmetric", "quickstart", 0.5, 40, 10, 64,
            "--data.init_args.noise.seed={seed}", ("--data.init_args.seed={seed}",),
        )
    ]  # fmt: skip
    for rate in (0.5, 0.2):
        percent = round(100 * rate)
        found += [
            Setting(
                f"omniglot_{percent}", f"Omniglot, {percent} % symmetric: 659 unseen classes",
                "dml/prism_omniglot", rate, 150, 964, 128, listed, omniglot,
            ),
            Setting(
                f"caltech101_{percent}", f"caltech101_dml, {percent} % symmetric: 49 unseen classes",
                "dml/prism_caltech101", rate, 250, 50, 128, listed, caltech,
            ),
        ]  # fmt: skip
        if rate == 0.5:
            found.append(
                Setting(
                    "cifar10n_worse", "CIFAR-10N worse (human labels, 40 % wrong): 10,000 test images",
                    "dml/prism_cifar10n", 0.4, 100, 10, 128, "--data.init_args.seed={seed}", cifar,
                )
            )  # fmt: skip
    return found


def command(setting: Setting, method: str, seed: int, folder: Path) -> list[str]:
    """Arguments of ``nrml`` for one run."""
    callbacks: list[dict[str, Any]] = [{"class_path": "RetrievalEvaluator"}]
    extra: list[str] = []
    if "prism" in method:
        init: dict[str, Any] = {"noise_rate": setting.rate, "warmup_steps": setting.warmup}
        if "vmf" in method:
            init |= {"similarity": "vmf", "shared_kappa": method.endswith("shared")}
        callbacks.append({"class_path": "PRISM", "init_args": init})
    elif method == "known_clean":
        callbacks.append({"class_path": "KnownClean", "init_args": {"granularity": "epoch"}})
    elif method == "consensus":
        callbacks.append({"class_path": "Consensus"})  # one default setting for all
    softmax = {"num_classes": setting.classes, "embedding_dim": setting.dim, "scale": 16.0}
    loss: dict[str, Any] = {"class_path": "CosineSoftmaxLoss", "init_args": softmax}
    if method == "cross_entropy":
        extra = ["--model.init_args.memory_size=0"]
    elif method in ("combined", "combined_prism", "consensus"):
        both = {"losses": [{"class_path": "ContrastiveLoss"}, loss], "weights": [1.0, 0.3]}
        loss = {"class_path": "CombinedLoss", "init_args": both}
    else:
        loss = {}
    if loss:
        extra += [
            "--model.init_args.loss=" + json.dumps(loss),
            "--model.init_args.optimizer.loss_lr=0.001",
        ]
    noise = [text.format(rate=setting.rate, seed=seed) for text in (setting.noise, *setting.fixed)]
    return [
        "fit",
        f"--config={REPO}/recipes/{setting.recipe}.yaml",
        f"--seed_everything={seed}",
        *noise,
        *extra,
        "--trainer.callbacks=null",  # else the list below would inherit options of the recipe's callbacks
        "--trainer.callbacks=" + json.dumps(callbacks),
        f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        "--trainer.enable_checkpointing=false",
    ]


def work(job: tuple[list[str], Path]) -> tuple[Path, float]:
    """Run one command in this process, on one thread; its output goes to ``log.txt``."""
    import torch

    from lightning_nrml.cli.app import run

    torch.set_num_threads(1)
    args, folder = job
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command.txt").write_text("nrml " + shlex.join(args) + "\n", encoding="utf-8")
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    start = time.process_time()
    if run(args):
        raise RuntimeError(f"run failed, see {folder / 'log.txt'}")
    seconds = time.process_time() - start
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "done.json").write_text(json.dumps({**result, "cpu_seconds": round(seconds, 1)}))
    return folder, seconds


def collect(out: Path, data: Path) -> list[dict[str, Any]]:
    """One row per finished run."""
    rows = []
    for setting in settings(data):
        for method in METHODS:
            for path in sorted((out / setting.name / method).glob("seed*/done.json")):
                done = json.loads(path.read_text(encoding="utf-8"))
                row = {"setting": setting.name, "method": method, "seed": int(path.parent.name[4:])}
                row |= {key: done["last"].get(key) for key in COLUMNS}
                row |= {"best_recall@1": done["best"].get("val/recall@1"), "cpu_seconds": done["cpu_seconds"]}
                rows.append(row)
    return rows


def table(setting: Setting, rows: list[dict[str, Any]]) -> str:
    """Markdown table of one setting: mean and standard deviation over the seeds, last epoch."""
    by: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["setting"] == setting.name:
            by[row["method"]].append(row)
    if not by:
        return ""

    def mean(method: str, key: str) -> float | None:
        values = [r[key] for r in by.get(method, []) if r[key] is not None]
        return statistics.fmean(values) if values else None

    def shown(method: str, key: str, digits: int = 3) -> str:
        values = [r[key] for r in by[method] if r[key] is not None and r[key] == r[key]]
        if not values:
            return "–"
        text = f"{statistics.fmean(values):.{digits}f}"
        return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")

    def gap(method: str, key: str) -> str:
        low, high, value = mean("none", key), mean("known_clean", key), mean(method, key)
        if method in UNFILTERED or None in (low, high, value) or high == low:
            return "–"
        return f"{(value - low) / (high - low):+.2f}"  # type: ignore[operator]

    lines = [
        f"**{setting.title}**", "",
        "| method | seeds | Recall@1 | MAP@R | gap closed | keep precision | keep recall | AUROC |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method, label in METHODS.items():
        if method not in by:
            continue
        quality = [shown(method, key) for key in COLUMNS[2:]]
        gaps = f"{gap(method, 'val/recall@1')} / {gap(method, 'val/map@r')}"
        lines.append(
            f"| {label} | {len(by[method])} | {shown(method, 'val/recall@1')} | {shown(method, 'val/map@r')} "
            f"| {gaps.replace('– / –', '–')} | {' | '.join(quality)} |"
        )
    return "\n".join(lines) + "\n"


def publish(out: Path, data: Path) -> None:
    """Write the CSV and replace the tables in docs/benchmarks.md."""
    rows = collect(out, data)
    folder = REPO / "docs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "noise_runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["setting", "method", "seed", *COLUMNS, "best_recall@1", "cpu_seconds"])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()})
    text = "\n".join(filter(None, (table(setting, rows) for setting in settings(data))))
    page = REPO / "docs" / "benchmarks.md"
    old = page.read_text(encoding="utf-8")
    mark = re.compile(r"(<!-- noise tables -->\n).*?(<!-- end noise tables -->)", re.DOTALL)
    page.write_text(mark.sub(lambda m: f"{m[1]}\n{text}\n{m[2]}", old), encoding="utf-8")
    print(text)


def main() -> None:
    """Parse arguments, run what is missing, publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPO / "data")
    parser.add_argument("--out", type=Path, default=REPO / "runs" / "noise_table")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="part of a setting's name")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    jobs = []
    for setting in settings(args.data.resolve()):
        for seed in args.seeds:
            for method in args.methods:
                folder = args.out / setting.name / method / f"seed{seed}"
                if args.only in setting.name and not (folder / "done.json").exists():
                    jobs.append((command(setting, method, seed, folder), folder))
    if jobs:
        import lightning_nrml.cli.app  # noqa: F401 - imported once, before the runs are forked

        os.environ["OMP_NUM_THREADS"] = "1"
        with mp.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
            for folder, seconds in pool.imap_unordered(work, jobs):
                print(
                    f"{time.strftime('%H:%M:%S')} {folder.relative_to(args.out)} {seconds:.0f} s", flush=True
                )
    publish(args.out, args.data.resolve())


if __name__ == "__main__":
    main()
