"""Remake the multi-label table and plot of docs/benchmarks.md: every method, kind of noise, rate and seed.

    python recipes/benchmarks/ucmerced_table.py --data DATA --jobs 2

Each run is exactly one ``nrml fit`` command (kept in its run folder as ``command.txt``). Finished runs are
not repeated, so the command can be stopped and started again; ``--only mixed_40``, ``--methods`` and
``--seeds 0`` narrow it. The runs evaluate the *test* images (their clean labels), and the last epoch counts:
nothing is chosen by them. Results: ``docs/benchmarks/ucmerced_runs.csv`` (one row per run), the tables in
``docs/benchmarks.md`` between their markers, and ``docs/assets/ucmerced.png``.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from runner import REPO, Job, parser, replace_tables, run_missing, shown, write_csv

METHODS = {
    "bce": "BCE, no defence",
    "elr": "ELR",
    "sat": "SAT",
    "jocor": "JoCoR",
    "rcml": "RCML",
    "prism": "BCE + MultiLabelPRISM, classifier (not told the rate)",
    "prism_both": "BCE + MultiLabelPRISM, classifier and memory (not told the rate)",
    "clean": "BCE on clean labels (upper bound)",
}
KINDS = {"mixed": "extra and missing labels", "subtractive": "missing labels", "additive": "extra labels"}
#: the central ones first
SETTINGS = (
    ("mixed", 40), ("mixed", 20), ("subtractive", 40),
    ("additive", 40), ("subtractive", 20), ("additive", 20),
)  # fmt: skip
COLUMNS = {
    "val/map_macro": "mAP macro",
    "val/map_micro": "mAP micro",
    "val/f1_macro": "F1 macro",
    "val/f1_micro": "F1 micro",
    "noise/precision": "keep precision",
    "noise/recall": "keep recall",
    "noise/auroc": "AUROC",
}
HEAD = ("kind", "rate", "method", "seed")
SIZE = 32
#: one recipe per method; all share net, optimiser, length and image size
SHARED = (
    f"--data.init_args.image_size={SIZE}",
    "--data.init_args.batch_size=32",
    f"--model.init_args.backbone_kwargs.input_size={SIZE}",
    "--model.init_args.optimizer.lr=0.003",  # the best of .001, .003, .006 on clean labels, validation split
    "--trainer.max_epochs=15",
    "--trainer.check_val_every_n_epoch=15",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.enable_checkpointing=false",
)
CALLBACKS = [{"class_path": "MultiLabelEvaluator"}, {"class_path": "MultiLabelPRISM", "init_args": {}}]
#: what else tells a method from its recipe
OWN = {"prism_both": ("--trainer.callbacks=null", "--trainer.callbacks=" + json.dumps(CALLBACKS))}


def command(kind: str, rate: int, method: str, seed: int, data: Path, folder: Path) -> list[str]:
    """Arguments of ``nrml`` for one run; ``kind`` ``none`` is the clean bound."""
    recipe = {"clean": "bce", "prism_both": "prism"}.get(method, method)
    splits = {"train": "split_train.txt", "val": "split_test.txt"}
    return [
        "fit",
        f"--config={REPO}/recipes/rs/{recipe}_ucmerced.yaml",
        f"--seed_everything={seed}",
        f"--data.init_args.path={data}/ucmerced_multilabel",
        "--data.init_args.splits=" + json.dumps(splits),
        f"--data.init_args.seed={seed}",
        f"--data.init_args.noise.kind={kind}",
        f"--data.init_args.noise.rate={rate / 100:g}",
        f"--data.init_args.noise.seed={seed}",
        *SHARED,
        *OWN.get(method, ()),
        f"--trainer.default_root_dir={folder}",
    ]


def runs(only: str, methods: list[str], seeds: list[int]) -> list[tuple[str, int, str, int]]:
    """``(kind, rate, method, seed)``, in the order in which they are worth having."""
    found: list[tuple[str, int, str, int]] = []
    for kind, rate in SETTINGS:
        for seed in seeds:
            for method in methods:
                job = ("none", 0, method, seed) if method == "clean" else (kind, rate, method, seed)
                if (method == "clean" or only in f"{kind}_{rate}") and job not in found:
                    found.append(job)
    return found


def folder_of(out: Path, job: tuple[str, int, str, int]) -> Path:
    """Where a run lies."""
    kind, rate, method, seed = job
    return out / (kind if kind == "none" else f"{kind}_{rate}") / method / f"seed{seed}"


def collect(out: Path) -> list[dict[str, Any]]:
    """One row per finished run."""
    rows = []
    for job in runs("", list(METHODS), list(range(100))):
        path = folder_of(out, job) / "done.json"
        if path.exists():
            done = json.loads(path.read_text(encoding="utf-8"))
            row = dict(zip(HEAD, job, strict=True)) | {key: done["last"].get(key) for key in COLUMNS}
            rows.append(row | {"cpu_seconds": done["cpu_seconds"]})
    return rows


def table(kind: str, rate: int, rows: list[dict[str, Any]]) -> str:
    """Markdown table of one setting: mean and standard deviation over the seeds, last epoch, test split."""
    by: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if (row["kind"], row["rate"]) == (kind, rate) or row["method"] == "clean":
            by[row["method"]].append(row)
    if not by.keys() - {"clean"}:
        return ""
    lines = [
        f"**UC Merced, {kind} {rate} %: {KINDS[kind]}**", "",
        "| method | seeds | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---" + "|---" * len(COLUMNS) + "|",
    ]  # fmt: skip
    for method, label in METHODS.items():
        if method in by:
            cells = [shown(r[key] for r in by[method]) for key in COLUMNS]
            lines.append(f"| {label} | {len(by[method])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """mAP over the noise rate, a panel for each kind; a line joins the means, a dot is one run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [k for k in KINDS if any(r["kind"] == k for r in rows)]
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    size = (max(7.0, 1.6 + 2.8 * len(kinds)), 3.9)
    figure, axes = plt.subplots(1, len(kinds), figsize=size, squeeze=False, sharey=True)
    clean = [(0, r["val/map_macro"]) for r in rows if r["method"] == "clean"]
    for axis, kind in zip(axes[0], kinds, strict=True):
        for i, (method, label) in enumerate(METHODS.items()):
            own = [
                (r["rate"], r["val/map_macro"]) for r in rows if (r["kind"], r["method"]) == (kind, method)
            ]
            if method == "clean" or not own:
                continue
            # without noise only BCE was run: all lines start at the clean bound
            points = clean + own
            rates = sorted({x for x, _ in points})
            means = [statistics.fmean(v for x, v in points if x == rate) for rate in rates]
            axis.plot(
                rates,
                means,
                color=f"C{i}",
                linewidth=2.2 if method == "prism" else 1.2,
                label=label.partition(" (")[0],
            )
            axis.plot(*zip(*own, strict=True), ".", color=f"C{i}", markersize=4)
        axis.set_title(f"{kind}: {KINDS[kind]}", fontsize=9)
        axis.set_xlabel("noise rate, % of a class's positives")
        axis.set_xticks([0, 20, 40])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("mAP macro, clean test labels")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.24, 1, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


def publish(rows: list[dict[str, Any]], docs: Path) -> None:
    """Write the CSV and the plot, and replace the tables in benchmarks.md."""
    write_csv(docs / "benchmarks" / "ucmerced_runs.csv", rows, [*HEAD, *COLUMNS, "cpu_seconds"])
    text = "\n".join(filter(None, (table(kind, rate, rows) for kind, rate in SETTINGS)))
    replace_tables(docs / "benchmarks.md", "ucmerced tables", text)
    if any(row["kind"] != "none" for row in rows):
        draw(rows, docs / "assets" / "ucmerced.png")


def main() -> None:
    """Parse arguments, run what is missing, publish."""
    options = parser(__doc__, "ucmerced_table", METHODS, METHODS)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--docs", type=Path, default=REPO / "docs", help="where tables and plot go")
    options.add_argument("--only", default="", help="part of a setting's name, such as mixed_40")
    args = options.parse_args()
    jobs = []
    for job in runs(args.only, args.methods, args.seeds):
        folder = folder_of(args.out, job)
        jobs.append(Job(folder, [command(*job, args.data.resolve(), folder)]))
    run_missing(jobs, args.out, args.jobs)
    publish(collect(args.out), args.docs)


if __name__ == "__main__":
    main()
