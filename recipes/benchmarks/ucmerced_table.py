"""Remake the multi-label table and plot of docs/benchmarks.md: every method, kind of noise, rate and seed.

    python recipes/benchmarks/ucmerced_table.py --data DATA --jobs 2

Each run is one ``nrml fit`` command, or fit, audit and fit (kept in its run folder as ``command.txt``).
Finished runs are not repeated, so the command can be stopped and started again; ``--size 32``,
``--only mixed_40``, ``--methods`` and ``--seeds 0`` narrow it. The runs evaluate the *test* images (their
clean labels), and the last epoch counts: nothing is chosen by them. Results:
``docs/benchmarks/ucmerced_runs.csv`` (one row per run), the tables in ``docs/benchmarks.md`` between their
markers, and ``docs/assets/ucmerced_*px.png``.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from runner import REPO, Job, parser, replace_tables, run_missing, shown, with_published, write_csv

METHODS = {
    "bce": "BCE, no defence",
    "elr": "ELR",
    "sat": "SAT",
    "jocor": "JoCoR",
    "rcml": "RCML, .6 of every batch kept",
    "rcml_ramp": "RCML, all kept at first, .8 at the end",
    "prism": "BCE + MultiLabelPRISM, classifier (not told the rate)",
    "prism_both": "BCE + MultiLabelPRISM, classifier and memory (not told the rate)",
    "cleaned": "BCE on labels that `nrml audit` corrected by a net trained with BCE",
    "cleaned_prism": "BCE on labels that `nrml audit` corrected by the ledger of MultiLabelPRISM",
    "clean": "BCE on clean labels (upper bound)",
}
#: which method trains the net, and what the audit is given of its run
AUDITED = {"cleaned": ("bce", "--ckpt_path"), "cleaned_prism": ("prism", "--ledger")}
#: where such an audit writes
FOLDERS = {"--ckpt_path": "audit", "--ledger": "audit_ledger"}
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
#: strided blocks of the net by side of the images: both end with few positions
WIDTHS = {32: [32, 64, 128, 128], 128: [32, 32, 64, 128, 128]}
#: one recipe per method; all share net, optimiser, length and image size
SHARED = (
    "--data.init_args.batch_size=32",
    "--model.init_args.optimizer.lr=0.003",  # the best on clean labels, validation split
    "--trainer.max_epochs=15",
    "--trainer.check_val_every_n_epoch=15",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.enable_checkpointing=false",
)
CALLBACKS = [{"class_path": "MultiLabelEvaluator"}, {"class_path": "MultiLabelPRISM", "init_args": {}}]
#: what else tells a method from its recipe
OWN = {
    "rcml": ("--model.init_args.keep_start=0.6", "--model.init_args.keep_end=0.6"),
    "prism_both": ("--trainer.callbacks=null", "--trainer.callbacks=" + json.dumps(CALLBACKS)),
}


class Run(NamedTuple):
    """One run; ``kind`` ``none`` is the clean bound."""

    size: int
    kind: str
    rate: int
    method: str
    seed: int


def stages(run: Run, data: Path, folder: Path) -> list[list[str]]:
    """Arguments of ``nrml`` for one run; of a net on audited labels for the first net and the audit, too."""
    if run.method not in AUDITED:
        return [command(run, data, folder)]
    method, given = AUDITED[run.method]
    first = folder / "first"
    kept = [*command(run._replace(method=method), data, first), "--trainer.enable_checkpointing=true"]
    noise = "--data.init_args.noise"
    again = [a for a in command(run._replace(method="bce"), data, folder) if not a.startswith(noise)]
    return [
        kept,
        ["audit", f"{given}={first}", "--rule=relabel"],
        [*again, f"{noise}={first}/{FOLDERS[given]}/labels_corrected.csv"],
    ]


def command(run: Run, data: Path, folder: Path) -> list[str]:
    """Arguments of ``nrml fit`` for one net."""
    size, kind, rate, method, seed = run
    recipe = {"clean": "bce", "prism_both": "prism", "rcml_ramp": "rcml"}.get(method, method)
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
        f"--data.init_args.image_size={size}",
        f"--model.init_args.backbone_kwargs.input_size={size}",
        f"--model.init_args.backbone_kwargs.widths={WIDTHS[size]}",
        f"--model.init_args.backbone_kwargs.strides={[2] * len(WIDTHS[size])}",
        *SHARED,
        *OWN.get(method, ()),
        f"--trainer.default_root_dir={folder}",
    ]


def runs(only: str, methods: list[str], seeds: list[int], sizes: Iterable[int] = tuple(WIDTHS)) -> list[Run]:
    """What to run, in the order in which it is worth having."""
    found: dict[Run, None] = {}
    for size in sizes:
        for kind, rate in SETTINGS:
            for seed in seeds:
                for method in methods:
                    if method == "clean":
                        found[Run(size, "none", 0, method, seed)] = None
                    elif only in f"{kind}_{rate}":
                        found[Run(size, kind, rate, method, seed)] = None
    return list(found)


def folder_of(out: Path, run: Run) -> Path:
    """Where a run lies."""
    setting = run.kind if run.kind == "none" else f"{run.kind}_{run.rate}"
    return out / f"{run.size}px" / setting / run.method / f"seed{run.seed}"


def collect(out: Path) -> list[dict[str, Any]]:
    """One row per finished run."""
    rows = []
    for run in runs("", list(METHODS), list(range(100))):
        path = folder_of(out, run) / "done.json"
        if path.exists():
            done = json.loads(path.read_text(encoding="utf-8"))
            row = run._asdict() | {key: done["last"].get(key) for key in COLUMNS}
            rows.append(row | {"cpu_seconds": done["cpu_seconds"]})
    return rows


def table(size: int, kind: str, rate: int, rows: list[dict[str, Any]]) -> str:
    """Markdown table of one setting: mean and standard deviation over the seeds, last epoch, test split."""
    by: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        same = (row["kind"], row["rate"]) == (kind, rate) or row["method"] == "clean"
        if row["size"] == size and same:
            by[row["method"]].append(row)
    if not by.keys() - {"clean"}:
        return ""
    lines = [
        f"**UC Merced, {size} px, {kind} {rate} %: {KINDS[kind]}**", "",
        "| method | seeds | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---" + "|---" * len(COLUMNS) + "|",
    ]  # fmt: skip
    for method, label in METHODS.items():
        if method in by:
            cells = [shown(r[key] for r in by[method]) for key in COLUMNS]
            lines.append(f"| {label} | {len(by[method])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """mAP over the noise rate, a panel for each kind; a line joins the means, a dot is one run.

    What lies far below BCE stands as a number at the lower edge, so that the others can be told apart.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [k for k in KINDS if any(r["kind"] == k for r in rows)]
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    size = (max(7.0, 1.6 + 2.8 * len(kinds)), 4.2)
    figure, axes = plt.subplots(1, len(kinds), figsize=size, squeeze=False, sharey=True, layout="constrained")
    clean = [(0, r["val/map_macro"]) for r in rows if r["method"] == "clean"]
    lowest = min(r["val/map_macro"] for r in rows if r["method"] == "bce") - 0.02
    for axis, kind in zip(axes[0], kinds, strict=True):
        noisy = {r["rate"] for r in rows if r["kind"] == kind}
        for i, (method, label) in enumerate(METHODS.items()):
            own = [
                (r["rate"], r["val/map_macro"]) for r in rows if (r["kind"], r["method"]) == (kind, method)
            ]
            if method == "clean" or not own:
                continue
            color = f"C{i}"
            axis.plot(*zip(*own, strict=True), ".", color=color, markersize=4, label=label.partition(" (")[0])
            # without noise only BCE was run: all lines start at the clean bound
            points = clean + own if {x for x, _ in own} == noisy else own
            rates = sorted({x for x, _ in points})
            means = [statistics.fmean(v for x, v in points if x == rate) for rate in rates]
            if points is not own:  # else nothing is known between
                axis.plot(rates, means, color=color, linewidth=2.2 if method == "prism" else 1.2)
            for rate, mean in zip(rates, means, strict=True):
                if mean < lowest:
                    text = f"{mean:.2f}".lstrip("0")
                    below = axis.annotate(text, (rate, lowest), (-3, 3), textcoords="offset points")
                    below.set(color=color, ha="right", bbox={"fc": "white", "lw": 0, "pad": 0.5})
        axis.set_title(f"{kind}: {KINDS[kind]}", fontsize=9)
        axis.set_xlabel("noise rate, % of a class's positives")
        axis.set_xticks([0, *sorted(noisy)])
        axis.set_ylim(bottom=lowest)
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("mAP macro, clean test labels")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


def publish(rows: list[dict[str, Any]], docs: Path) -> None:
    """Write the CSV and the plot, and replace the tables in benchmarks.md."""
    target = docs / "benchmarks" / "ucmerced_runs.csv"
    orders = {"size": list(WIDTHS), "kind": ["none", *KINDS], "method": list(METHODS)}
    rows = with_published(target, rows, {name: orders.get(name) for name in Run._fields})
    write_csv(target, rows, [*Run._fields, *COLUMNS, "cpu_seconds"])
    for size in WIDTHS:
        text = "\n".join(filter(None, (table(size, kind, rate, rows) for kind, rate in SETTINGS)))
        replace_tables(docs / "benchmarks.md", f"ucmerced tables {size} px", text)
        own = [row for row in rows if row["size"] == size]
        if any(row["kind"] != "none" for row in own):
            draw(own, docs / "assets" / f"ucmerced_{size}px.png")


def main() -> None:
    """Parse arguments, run what is missing, publish."""
    options = parser(__doc__, "ucmerced_table", METHODS, METHODS)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--docs", type=Path, default=REPO / "docs", help="where tables and plot go")
    options.add_argument("--only", default="", help="part of a setting's name, such as mixed_40")
    options.add_argument("--size", type=int, nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    args = options.parse_args()
    jobs = []
    for run in runs(args.only, args.methods, args.seeds, args.size):
        folder = folder_of(args.out, run)
        jobs.append(Job(folder, stages(run, args.data.resolve(), folder)))
    run_missing(jobs, args.out, args.jobs)
    publish(collect(args.out), args.docs)


if __name__ == "__main__":
    main()
