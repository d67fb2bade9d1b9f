"""Remake the table of self-supervised methods of docs/benchmarks.md: pretrain, then kNN and linear probe.

    python recipes/benchmarks/ssl_table.py --jobs 2                              # digits, no data needed
    python recipes/benchmarks/ssl_table.py --data DATA --settings digits caltech101 cifar10

Each run is one ``nrml fit`` of a recipe and one of a ``LinearProbe`` recipe on its last checkpoint (kept in
the run folder as ``command.txt``). ``random`` probes the same backbone untrained, ``pixels`` the images
themselves. Finished runs are not repeated, so the command can be stopped and started again; ``--seeds 0``
and ``--methods`` narrow it. Results: ``docs/benchmarks/ssl_runs.csv`` (one row per run) and the tables in
``docs/benchmarks.md`` between their markers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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

METHODS = {
    "pixels": "pixels",
    "random": "random backbone",
    "simclr": "SimCLR",
    "moco": "MoCo-v2",
    "mochi": "MoCHi",
    "byol": "BYOL",
    "swav": "SwAV",
}
LEARNED = ("simclr", "moco", "mochi", "byol", "swav")
COLUMNS = ("knn_top1", "probe_top1", "recall@1", "map@r")
LENGTH = ("max_epochs", "check_val_every_n_epoch")
# images of CIFAR-10: the first ones of each split
CIFAR_TRAIN, CIFAR_TEST = 10_000, 2_000


@dataclass(frozen=True)
class Setting:
    """One data set: where methods train and where their backbones are measured."""

    name: str
    title: str
    recipes: str  # recipes/ssl/<method>_<recipes>.yaml and linear_probe_<recipes>.yaml
    size: int
    source: str = ""  # file under --data
    prepared: str = ""  # file that this script writes from it
    pretrain: tuple[str, ...] = ()  # overrides; {data} and {prepared} are filled in
    probe: tuple[str, ...] = ()


def settings() -> list[Setting]:
    """All settings."""
    cifar_kwargs = json.dumps({"input_size": 32, "widths": [32, 64, 128, 128]})
    cifar_model = f"--model.init_args.backbone_kwargs={cifar_kwargs}"
    cifar_data = ("--data.init_args.path={prepared}", "--data.init_args.image_size=32")
    # the recipes of caltech101 go on for 40 epochs; this keeps a run within a few minutes of one core
    short = ("--trainer.max_epochs=12", "--trainer.check_val_every_n_epoch=12")
    cifar_views = (
        "--data.init_args.train_view.init_args.size=32", "--data.init_args.eval_view.init_args.size=32"
    )  # fmt: skip
    return [
        Setting("digits", "scikit-learn digits: 1,297 train and 500 test images", "digits", 8),
        Setting(
            "caltech101", "caltech101_dml: measured on 49 classes that pretraining has not seen",
            "caltech101", 48, "caltech101_dml/caltech101_dml_96.npz", "caltech101_unseen.npz",
            ("--data.init_args.path={data}", *short), ("--data.init_args.path={prepared}",),
        ),
        Setting(
            "cifar10", f"CIFAR-10, the first {CIFAR_TRAIN:,} train and {CIFAR_TEST:,} test images",
            "caltech101", 32, "cifar10n/cifar10n_jpeg.npz", "cifar10_subset.npz",
            (
                *cifar_data, *cifar_views, cifar_model,
                "--data.init_args.subset=null", "--trainer.callbacks=null", *short,
            ),
            (
                *cifar_data, *cifar_views,
                "--trainer.max_epochs=10", "--trainer.check_val_every_n_epoch=10",
            ),
        ),
    ]  # fmt: skip


def prepare(setting: Setting, source: Path, target: Path) -> None:
    """Write the subset that a setting needs; the choice depends on nothing but the file.

    caltech101: the images of the unseen classes in ``balanced60``, every fourth one of each class for the
    test. CIFAR-10: the first images of both splits.
    """
    if not setting.prepared or target.exists():
        return
    with np.load(source, allow_pickle=False) as file:
        if setting.name == "cifar10":
            parts = {"train": ("clean_label", CIFAR_TRAIN), "test": ("test_label", CIFAR_TEST)}
            arrays = {"class_names": file["class_names"]}
            for split, (label, rows) in parts.items():
                jpeg, offsets = _images(file[f"{split}_jpeg"], file[f"{split}_offsets"], np.arange(rows))
                arrays |= {f"{split}_jpeg": jpeg, f"{split}_offsets": offsets}
                arrays[f"{split}_label"] = file[label][:rows].astype(np.int64)
        else:
            rows = np.flatnonzero(~file["train_class"] & file["balanced60"])
            label = file["label"][rows].astype(np.int64)
            position = np.array([(label[:i] == label[i]).sum() for i in range(len(label))])
            jpeg, offsets = _images(file["jpeg"], file["offsets"], rows)
            arrays = {
                "jpeg": jpeg,
                "offsets": offsets,
                "label": label - label.min(),
                "train": position % 4 != 3,
            }
            arrays["class_names"] = file["class_names"][label.min() :]
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **arrays)


def _images(jpeg: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [jpeg[offsets[row] : offsets[row + 1]] for row in rows]
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


def commands(
    setting: Setting, method: str, seed: int, folder: Path, source: Path, target: Path, epochs: int | None
) -> list[list[str]]:
    """Arguments of ``nrml`` for one run: pretraining, if there is any, and the probe."""
    common = [
        f"--seed_everything={seed}",
        f"--data.init_args.seed={seed}",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
    ]

    def filled(options: tuple[str, ...]) -> list[str]:
        return [text.replace("{data}", str(source)).replace("{prepared}", str(target)) for text in options]

    probe = [
        "fit",
        f"--config={REPO}/recipes/ssl/linear_probe_{setting.recipes}.yaml",
        *filled(setting.probe),
        *common,
        f"--trainer.default_root_dir={folder / 'probe'}",
        "--trainer.enable_checkpointing=false",
    ]
    if method == "pixels":
        kwargs = json.dumps({"input_size": setting.size})
        return [[*probe, "--model.init_args.backbone=pixels", f"--model.init_args.backbone_kwargs={kwargs}"]]
    kwargs_of = [text for text in setting.pretrain if "backbone_kwargs" in text]
    if method == "random":
        return [[*probe, *kwargs_of]]
    views = [f"--data.init_args.train_view.init_args.small_size={setting.size}"] if method == "swav" else []
    first = [
        "fit",
        f"--config={REPO}/recipes/ssl/{method}_{setting.recipes}.yaml",
        *filled(setting.pretrain),
        *(views if setting.name == "cifar10" else []),
        *common,
        f"--trainer.default_root_dir={folder / 'pretrain'}",
        *([] if epochs is None else [f"--trainer.{key}={epochs}" for key in LENGTH]),
    ]
    start = folder / "pretrain" / "checkpoints" / "last.ckpt"
    return [first, [*probe, *kwargs_of, f"--model.init_args.init_weights={start}"]]


def measured(folder: Path) -> dict[str, Any]:
    """What pretraining, if there was any, and probe reached in their last epochs."""
    stages = [folder / stage for stage in ("pretrain", "probe")]
    found = [last_results(stage)["last"] for stage in stages if (stage / "results.json").is_file()]
    return {key: last[f"val/{key}"] for last in found for key in COLUMNS if f"val/{key}" in last}


def collect(out: Path) -> list[dict[str, Any]]:
    """One row per finished run."""
    rows = []
    for setting in settings():
        for method in METHODS:
            for path in sorted((out / setting.name / method).glob("seed*/done.json")):
                done = json.loads(path.read_text(encoding="utf-8"))
                row = {"setting": setting.name, "method": method, "seed": int(path.parent.name[4:])}
                rows.append(row | {key: done.get(key) for key in (*COLUMNS, "cpu_seconds")})
    return rows


def table(setting: Setting, rows: list[dict[str, Any]]) -> str:
    """Markdown table of one setting: mean and standard deviation over the seeds, last epoch."""
    mine = [row for row in rows if row["setting"] == setting.name]
    if not mine:
        return ""
    keys = [key for key in COLUMNS if any(row[key] is not None for row in mine)]
    heads = {"knn_top1": "kNN top-1", "probe_top1": "linear top-1", "recall@1": "Recall@1", "map@r": "MAP@R"}

    lines = [
        f"**{setting.title}**", "",
        f"| method | seeds | {' | '.join(heads[key] for key in keys)} |",
        "|---" * (2 + len(keys)) + "|",
    ]  # fmt: skip
    for method, label in METHODS.items():
        own = [row for row in mine if row["method"] == method]
        if own:
            cells = " | ".join(shown(row[key] for row in own) for key in keys)
            lines.append(f"| {label} | {len(own)} | {cells} |")
    return "\n".join(lines) + "\n"


def publish(out: Path) -> None:
    """Write the CSV and replace the tables in docs/benchmarks.md."""
    target = REPO / "docs" / "benchmarks" / "ssl_runs.csv"
    key = {"setting": [setting.name for setting in settings()], "method": list(METHODS), "seed": None}
    rows = with_published(target, collect(out), key)
    write_csv(target, rows, [*key, *COLUMNS, "cpu_seconds"])
    text = "\n".join(filter(None, (table(setting, rows) for setting in settings())))
    replace_tables(REPO / "docs" / "benchmarks.md", "ssl tables", text)


def main() -> None:
    """Parse arguments, run what is missing, publish."""
    names = [setting.name for setting in settings()]
    options = parser(__doc__, "ssl_table", METHODS, METHODS)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--settings", nargs="+", choices=names, default=["digits"])
    options.add_argument("--epochs", type=int, help="pretraining epochs, for a try-out; default the recipe's")
    args = options.parse_args()
    out, jobs = args.out.resolve(), []
    for setting in settings():
        if setting.name not in args.settings:
            continue
        source, target = args.data.resolve() / setting.source, out / setting.prepared
        prepare(setting, source, target)
        for seed in args.seeds:
            for method in args.methods:
                folder = out / setting.name / method / f"seed{seed}"
                stages = commands(setting, method, seed, folder, source, target, args.epochs)
                jobs.append(Job(folder, stages, measured))
    run_missing(jobs, out, args.jobs)
    publish(out)


if __name__ == "__main__":
    main()
