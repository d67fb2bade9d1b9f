"""Draw ``docs/assets/noise.png`` from ``docs/benchmarks/noise_runs.csv``.

    python docs/make_figures.py

One column per data set, one row per metric: what wrong labels do to retrieval, and what a filter restores.
A bar is the mean over the seeds, a dot is one seed. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).resolve().parent
#: method of the CSV -> label and colour, top to bottom
METHODS = {
    "shuffled_combined_known_clean": ("both losses, right labels only", "#7b8794"),
    "shuffled_consensus": ("both losses, Consensus (rate found)", "#0b6e4f"),
    "shuffled_cross_entropy": ("cross-entropy, no filter", "#e0a458"),
    "known_clean": ("contrastive, right labels only", "#b6bfc8"),
    "prism_vmf_shared": ("contrastive, PRISM (told the rate)", "#21a179"),
    "none": ("contrastive, no filter", "#c8553d"),
}
#: setting of the CSV -> title
SETTINGS = {
    "digits_50": "digits\n50 % wrong",
    "omniglot_50": "Omniglot\n50 % wrong",
    "caltech101_50": "caltech101\n50 % wrong",
    "cifar10n_worse": "CIFAR-10N worse\n40 % wrong, by people",
}
METRICS = {"val/recall@1": "Recall@1", "val/map@r": "MAP@R"}
Values = dict[tuple[str, str, str], list[float]]


def read(path: Path) -> Values:
    """``(setting, method, metric) -> one value per seed``."""
    values: Values = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for metric in METRICS:
                if row[metric]:
                    values[row["setting"], row["method"], metric].append(float(row[metric]))
    return values


def draw(values: Values, target: Path) -> None:
    """Write the picture; settings without runs are left out."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    settings = [s for s in SETTINGS if any(key[0] == s for key in values)]
    if not settings:
        raise ValueError("the CSV has none of the settings " + ", ".join(SETTINGS))
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    size = (3.0 + 2.1 * len(settings), 4.4)
    figure, axes = plt.subplots(len(METRICS), len(settings), figsize=size, squeeze=False, sharey=True)
    for i, (metric, name) in enumerate(METRICS.items()):
        for j, setting in enumerate(settings):
            panel(axes[i][j], values, setting, metric)
            if i == 0:
                axes[i][j].set_title(SETTINGS[setting], fontsize=9)
            axes[i][j].set_xlabel(name)
    seeds = max(len(v) for v in values.values())
    figure.text(
        0.005, 0.005, f"bar: mean over the seeds (at most {seeds}); dot: one seed; last epoch", fontsize=7
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


def panel(axis, values: Values, setting: str, metric: str) -> None:  # type: ignore[no-untyped-def]
    """Bars of one data set and one metric."""
    shown, means = 0.0, []
    for y, (method, (_, colour)) in enumerate(METHODS.items()):
        found = values.get((setting, method, metric), [])
        if found:
            mean = statistics.fmean(found)
            axis.barh(y, mean, color=colour, height=0.72)
            axis.plot(found, [y] * len(found), "o", color="black", markersize=2.2, alpha=0.7)
            shown = max(shown, *found)
            means.append((y, mean))
    for y, mean in means:  # beside the bar where it is too short to hold the number
        inside = mean > 0.3 * shown
        place, colour = (mean * 0.5, "white") if inside else (mean + 0.12 * shown, "black")
        axis.text(place, y, f"{mean:.3f}", va="center", ha="center", color=colour, fontsize=8)
    axis.set_yticks(range(len(METHODS)), [label for label, _ in METHODS.values()])
    axis.invert_yaxis() if not axis.yaxis_inverted() else None
    axis.set_xlim(0, max(shown * 1.08, 0.1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def main() -> None:
    """Parse arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=DOCS / "benchmarks" / "noise_runs.csv")
    parser.add_argument("--out", type=Path, default=DOCS / "assets" / "noise.png")
    args = parser.parse_args()
    draw(read(args.csv), args.out)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
