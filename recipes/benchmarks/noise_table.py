"""Remake the noise tables of docs/benchmarks.md: every method, data set, rate and seed, then the tables.

    python recipes/benchmarks/noise_table.py --data DATA --jobs 2

Each run is one ``nrml fit`` command, kept in its run folder as ``command.txt`` (with the ``nrml audit``
before it, where labels are turned); nets that are kept also go through ``nrml audit``. Finished runs are not
repeated, so the command can be stopped and started again; ``--only caltech101`` and ``--seeds 0`` narrow it.
Results: ``docs/benchmarks/noise_runs.csv`` (one row per run), ``noise_detection.csv`` (how well each of them
found the wrong labels), and the tables in ``docs/benchmarks.md`` between their markers; rows of the CSVs
without a run here stay.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from noise_frozen import DETECTORS, SCORERS, judge_run
from noise_settings import (
    BOTH_LOSSES,
    FROZEN,
    METHODS,
    SHUFFLED,
    SOFTMAX_ONLY,
    UNFILTERED,
    USUAL,
    Setting,
    prepare,
    recipe,
    settings,
    stages,
)
from runner import (
    REPO,
    Job,
    last_results,
    parser,
    replace_tables,
    run_missing,
    shown,
    with_published,
    write_csv,
)

COLUMNS = ("val/recall@1", "val/map@r", "noise/precision", "noise/recall", "noise/auroc")
QUALITY = ("precision", "recall", "auroc", "average_precision")
#: share of wrong labels: what there is, and what a detector that is not told finds
RATES = ("wrong", "noise_rate")
#: noise that costs less than this leaves no gap to close
MIN_GAP = 0.02
#: of the overviews: what a column is called, then the method or detector and what is measured
OVERVIEWS: dict[str, dict[str, tuple[str, str]]] = {
    "noise overview": {
        title: (method, "val/recall@1")
        for title, method in {
            "no filter": "none",
            "PRISM, told the rate": "prism_vmf_shared",
            "Consensus, told nothing": "consensus",
            "known clean": "known_clean",
            "CE, no filter": "cross_entropy",
            "CE shuffled, no filter": "shuffled_cross_entropy",
            "both losses shuffled, Consensus": "shuffled_consensus",
            "both losses shuffled, known clean": "shuffled_combined_known_clean",
        }.items()
    },
    "detection overview": {
        title: (method, "auroc")
        for title, method in {
            "PRISM, told the rate": "prism_vmf_shared",
            "small loss, told the rate": "small_loss",
            "Consensus, told nothing": "consensus",
            "both losses shuffled, Consensus": "shuffled_consensus",
            "cleanlab, by class": "cleanlab",
            "`nrml audit`, by class": "audit",
            "cleanlab, shuffled": "shuffled_cleanlab",
            "`nrml audit`, shuffled": "shuffled_audit",
        }.items()
    },
    "rate overview": {
        "really wrong": ("shuffled_consensus", "wrong"),
        "Consensus, both losses, shuffled batches": ("shuffled_consensus", "noise_rate"),
        "`nrml audit`": ("shuffled_audit", "noise_rate"),
        "cleanlab": ("shuffled_cleanlab", "noise_rate"),
    },
}
#: runs of a row that is complete
SEEDS = 3
#: what a method or detector is called, in the order of the tables
LABELS = METHODS | {row: text for rows in DETECTORS.values() for row, text in rows.items()}


def judged(folder: Path) -> dict[str, Any]:
    """The results of a run whose frozen embeddings are judged first."""
    judge_run(folder)
    return last_results(folder)


# ---- results ---------------------------------------------------------------------------------------


def finished(out: Path, data: Path) -> Iterable[tuple[str, str, Path]]:
    """Setting, method and folder of the finished runs."""
    for setting in settings(data):
        for method in METHODS:
            for path in sorted((out / setting.name / method).glob("seed*/done.json")):
                yield setting.name, method, path.parent


def collect(out: Path, data: Path) -> list[dict[str, Any]]:
    """One row per finished run."""
    rows = []
    for setting, method, folder in finished(out, data):
        if method in FROZEN:  # the same net once more
            continue
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        row = {"setting": setting, "method": method, "seed": int(folder.name[4:])}
        row |= {key: done["last"].get(key) for key in COLUMNS}
        row |= {"best_recall@1": done["best"].get("val/recall@1"), "cpu_seconds": done["cpu_seconds"]}
        rows.append(row)
    return rows


def collect_detection(out: Path, data: Path) -> list[dict[str, Any]]:
    """How well each finished run, and each scorer of frozen embeddings, found the wrong labels."""
    rows = []
    for setting, method, folder in finished(out, data):
        start = {"setting": setting, "seed": int(folder.name[4:])}
        if method in FROZEN:
            found = json.loads((folder / "detection.json").read_text(encoding="utf-8"))
            rows += [
                {**start, "method": row, **{k: found[scorer].get(k) for k in (*QUALITY, "noise_rate")}}
                for scorer, row in zip(SCORERS, DETECTORS[method], strict=True)
            ]
        elif method not in UNFILTERED:
            last = json.loads((folder / "done.json").read_text(encoding="utf-8"))["last"]
            decided = {key: last.get(f"noise/{key}") for key in ("precision", "recall")}
            decided["noise_rate"] = last.get("noise/estimated_rate")
            rows.append({**start, "method": method, **decided, **ranked(folder / "noise_ledger.parquet")})
    return rows


def ranked(ledger: Path) -> dict[str, float]:
    """AUROC and average precision of each sample's last score, and the share of wrong labels.

    Samples that the run has not seen have no score and count in neither of the first two.
    """
    import pandas as pd
    import torch

    from lightning_nrml.metrics import filter_quality

    frame = pd.read_parquet(ledger)
    score = torch.from_numpy(frame["log_p_clean"].to_numpy(dtype="float32", copy=True))
    wrong = torch.from_numpy((frame["label"] != frame["clean_label"]).to_numpy(copy=True))
    quality = filter_quality(torch.ones(len(score)), wrong, score)
    return {key: quality[key] for key in ("auroc", "average_precision")} | {
        "wrong": float(wrong.double().mean())
    }


# ---- tables ----------------------------------------------------------------------------------------


def by_method(setting: Setting, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a setting by method, in the order of the tables."""
    by = defaultdict(list)
    for row in rows:
        if row["setting"] == setting.name:
            by[row["method"]].append(row)
    return {method: by[method] for method in LABELS if method in by}


def bounds(method: str) -> tuple[str, str]:
    """Without a filter, and with one that knows which labels are right: same loss, batches and start.

    Some of these have no run; the gap is then unknown.
    """
    start = next((s for s in (SHUFFLED, "pretrained_") if method.startswith(s)), "")
    if method in BOTH_LOSSES:
        return f"{start}combined", f"{start}combined_known_clean"
    if start == SHUFFLED:
        return f"{start}cross_entropy", f"{start}known_clean"
    if method in SOFTMAX_ONLY or method == "tsint":  # T-SINT has no memory
        return f"{method}_none", f"{method}_known_clean"
    return f"{start}none", f"{start}known_clean"


def table(setting: Setting, rows: list[dict[str, Any]]) -> str:
    """Markdown table of one setting: mean and standard deviation over the seeds, last epoch."""
    by = by_method(setting, rows)
    if not by:
        return ""

    def mean(method: str, key: str) -> float | None:
        values = [r[key] for r in by.get(method, []) if r[key] is not None]
        return statistics.fmean(values) if values else None

    def gap(method: str, key: str) -> str:
        low, high, value = (mean(name, key) for name in (*bounds(method), method))
        if method in UNFILTERED or low is None or high is None or value is None or high - low < MIN_GAP:
            return "–"
        return f"{(value - low) / (high - low):+.2f}"

    lines = [
        f"**{setting.title}**", "",
        "| method | seeds | Recall@1 | MAP@R | gap closed | keep precision | keep recall | AUROC |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method, own in by.items():
        gaps = f"{gap(method, 'val/recall@1')} / {gap(method, 'val/map@r')}"
        recall, map_r, *quality = [shown(r[key] for r in own) for key in COLUMNS]
        lines.append(
            f"| {METHODS[method]} | {len(own)} | {recall} | {map_r} "
            f"| {gaps.replace('– / –', '–')} | {' | '.join(quality)} |"
        )
    return "\n".join(lines) + "\n"


def detection_table(setting: Setting, rows: list[dict[str, Any]]) -> str:
    """Markdown table of how well the wrong labels of one setting were found."""
    by = by_method(setting, rows)
    if not by:
        return ""
    lines = [
        f"**{setting.title}**", "",
        "| detector | seeds | keep precision | keep recall | AUROC | average precision |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method, own in by.items():
        cells = " | ".join(shown(r[key] for r in own) for key in QUALITY)
        lines.append(f"| {LABELS[method]} | {len(own)} | {cells} |")
    return "\n".join(lines) + "\n"


def overview(found: list[Setting], rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """Markdown table with a row for each setting: means, the number of seeds beside those of fewer than 3."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for setting in found:
        by = by_method(setting, rows)
        measured = [[r.get(key) for r in by.get(method, ())] for method, key in columns.values()]
        known = [[v for v in values if v is not None] for values in measured]
        few = [f" ({len(v)})" if 0 < len(v) < SEEDS else "" for v in known]
        if any(known):
            means = [shown(v).partition(" ")[0] + said for v, said in zip(known, few, strict=True)]
            lines.append(f"| {setting.title.partition(':')[0]} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def publish(out: Path, data: Path) -> None:
    """Write the CSVs and replace the tables in docs/benchmarks.md."""
    folder = REPO / "docs" / "benchmarks"
    key = {"setting": [setting.name for setting in settings(data)], "method": list(LABELS), "seed": None}
    rows = with_published(folder / "noise_runs.csv", collect(out, data), key)
    detection = with_published(folder / "noise_detection.csv", collect_detection(out, data), key)
    write_csv(folder / "noise_runs.csv", rows, [*key, *COLUMNS, "best_recall@1", "cpu_seconds"])
    write_csv(folder / "noise_detection.csv", detection, [*key, *QUALITY, *RATES])
    page, of_all = REPO / "docs" / "benchmarks.md", settings(data)
    for name, make, content in (("noise", table, rows), ("detection", detection_table, detection)):
        made = "\n".join(filter(None, (make(setting, content) for setting in of_all)))
        replace_tables(page, f"{name} tables", made)
    for name, columns in OVERVIEWS.items():
        content = rows if name == "noise overview" else detection
        replace_tables(page, name, overview(of_all, content, columns))


def main() -> None:
    """Parse arguments, run what is missing, publish."""
    options = parser(__doc__, "noise_table", METHODS, USUAL)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--only", default="", help="part of a setting's name")
    args = options.parse_args()
    jobs = []
    for setting in settings(args.data.resolve()):
        if args.only not in setting.name:
            continue
        prepare(setting, args.out)
        for seed in args.seeds:
            for method in args.methods:
                if recipe(setting, method):
                    folder = args.out / setting.name / method / f"seed{seed}"
                    result = judged if method in FROZEN else last_results
                    jobs.append(Job(folder, stages(setting, method, seed, folder), result))
    run_missing(jobs, args.out, args.jobs)
    publish(args.out, args.data.resolve())


if __name__ == "__main__":
    main()
