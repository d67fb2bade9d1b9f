"""Remake the InsCLR table of docs/benchmarks.md: fine-tuning by InsCLR or by SimCLR from the same start.

    python recipes/benchmarks/insclr_table.py --data DATA --seeds 0 1 2

Omniglot: trains on the images of 964 characters without their labels, from the label-free weights
``simclr_start.npz``, and retrieves among 659 other characters (20 drawings each). All rows share net, start,
affine augmentation, optimiser, schedule and number of steps; a SimCLR batch is 128 images in two views, an
InsCLR batch 32 anchors with 3 neighbours in one augmented and one plain view. Finished runs are not
repeated. Results: ``docs/benchmarks/insclr_runs.csv`` (one row per run) and the table in
``docs/benchmarks.md`` between its markers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from runner import REPO, parser, replace_tables, shown, with_published, write_csv, write_json

from lightning_nrml.callbacks import RetrievalEvaluator
from lightning_nrml.data import OmniglotDataModule
from lightning_nrml.data.views import InsCLRViews, MetricView, Views
from lightning_nrml.losses import NTXentLoss
from lightning_nrml.memory import MiningConfig
from lightning_nrml.modules import InsCLR, MetricLearning
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig
from lightning_nrml.types import Batch, StepOutput

AFFINE: dict[str, Any] = {
    "crop_scale": None, "flip": 0.0, "degrees": 15, "scale": (0.85, 1.15), "shear": 0.15, "translate": 0.12,
    "mean": (0.078,), "std": (0.225,),
}  # fmt: skip
#: INSTRE's published thresholds, for a net whose neighbours lie as close as here
INSTRE = {"positive": 0.95, "negative": 0.65, "in_batch": 0.6, "rounds": 2, "pick": 20, "hit": 0.6}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "start": ("the start itself", {}),
    "simclr": ("SimCLR, continued", {}),
    "insclr_base": (
        "InsCLR base, without memory",
        {"stage": "base", "memory_size": 0},
    ),
    "insclr_impr": (
        "InsCLR impr, INSTRE's thresholds",
        {"stage": "impr", "memory_size": 2000, "memory_negatives": False, "mining": INSTRE},
    ),
}
COLUMNS = ("val/recall@1", "val/map@r", "train_cpu_seconds")


class SimCLROnEmbedding(MetricLearning):
    """NT-Xent on the very embedding that is evaluated, which is how the start weights were made."""

    def step(self, batch: Batch) -> StepOutput:
        """Two views through backbone and head."""
        z_a, z_b = self.head(self.backbone(torch.cat(batch["views"]))).chunk(2)
        loss = NTXentLoss(0.2)
        return StepOutput(z_a, batch["label"], batch["index"], loss_fn=lambda weight: loss(z_a, z_b, weight))


def views(method: str) -> Views:
    """Two augmented views for SimCLR, an augmented and a plain one for InsCLR."""
    if method != "simclr":
        return InsCLRViews(28, **AFFINE)
    pair = MetricView(28, **AFFINE)
    pair.views.append(pair.views[0])  # the number of a view enters its random draws
    return pair


def work(method: str, seed: int, steps: int, lr: float, data: Path) -> dict[str, Any]:
    """One run: train, then retrieve among the unseen characters."""
    L.seed_everything(seed, verbose=False)
    net: dict[str, Any] = {
        "backbone": "conv4", "backbone_kwargs": {"input_size": 28, "widths": [64, 128, 128, 128]},
        "in_channels": 1, "head": "linear", "embedding_dim": 128, "channels_last": True,
        "init_weights": str(data / "omniglot" / "simclr_start.npz"),
        "optimizer": OptimizerConfig("adam", lr, 1e-5), "schedule": ScheduleConfig("cosine", 20),
    }  # fmt: skip
    options = dict(METHODS[method][1])
    if "mining" in options:
        options["mining"] = MiningConfig(**options["mining"])
    insclr = method.startswith("insclr")
    module = InsCLR(**net, pool_size=100, **options) if insclr else SimCLROnEmbedding(**net)
    datamodule = OmniglotDataModule(
        path=str(data / "omniglot" / "omniglot.npz"), batch_size=128, eval_batch_size=512, seed=seed,
        train_view=views(method),
    )  # fmt: skip
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    begin = time.process_time()
    if method == "start":
        module.trainer = L.Trainer(**quiet)
        module.on_fit_start()  # loads the start weights
    else:
        clip = 10.0 if insclr else None
        L.Trainer(**quiet, max_steps=steps, max_epochs=-1, limit_val_batches=0, gradient_clip_val=clip).fit(
            module, datamodule
        )
    seconds = time.process_time() - begin
    found = L.Trainer(**quiet, callbacks=[RetrievalEvaluator()]).validate(module, datamodule, verbose=False)[
        0
    ]
    return {**{k: float(found[k]) for k in COLUMNS[:2]}, "train_cpu_seconds": round(seconds, 1)}


def collect(out: Path) -> list[dict[str, Any]]:
    """One row per finished run."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds, after the last step."""
    lines = ["| method | steps | learning rate | seeds | Recall@1 | MAP@R |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((r["method"], r["steps"], r["lr"]) for r in rows):
        same = [r for r in rows if (r["method"], r["steps"], r["lr"]) == key]
        cells = " | ".join(shown(r[column] for r in same) for column in COLUMNS[:2])
        steps, lr = ("–", "–") if key[0] == "start" else (str(key[1]), f"{key[2]:g}")
        lines.append(f"| {METHODS[key[0]][0]} | {steps} | {lr} | {len(same)} | {cells} |")
    return "\n".join(lines) + "\n"


def publish(out: Path) -> None:
    """Write the CSV and replace the table in docs/benchmarks.md."""
    target = REPO / "docs" / "benchmarks" / "insclr_runs.csv"
    key = {"steps": None, "method": list(METHODS), "lr": None, "seed": None}
    rows = with_published(target, collect(out), key)
    names = ("method", "steps", "lr", "seed", *COLUMNS)
    write_csv(target, rows, names, as_is=("lr", "train_cpu_seconds"))
    replace_tables(REPO / "docs" / "benchmarks.md", "insclr table", table(rows))


def main() -> None:
    """Parse arguments, run what is missing, publish."""
    options = parser(__doc__, "insclr_table", METHODS, METHODS)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--lr", type=float, default=3e-4)
    args = options.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in args.methods:
            if method == "start" and seed != args.seeds[0]:
                continue  # the same weights for all seeds
            steps, lr = (0, 0.0) if method == "start" else (args.steps, args.lr)
            path = args.out / f"{method}_{steps}_{lr:g}_{seed}.json"
            if not path.exists():
                found = work(method, seed, steps, lr, args.data.resolve())
                row = {"method": method, "steps": steps, "lr": lr, "seed": seed, **found}
                write_json(path, row)
                print(f"{time.strftime('%H:%M:%S')} {path.stem} {found}", flush=True)
    publish(args.out)


if __name__ == "__main__":
    main()
