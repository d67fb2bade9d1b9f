"""Our contrastive loss with PRISM beside the official code's: same data, net, batches, views and optimiser.

    git clone https://github.com/alibaba-edu/Ranking-based-Instance-Selection CLONE
    python recipes/benchmarks/prism_peer.py --data DATA --official CLONE --jobs 2

Ours is one ``nrml fit`` of a recipe. The peer is the official loss, filter and memory, loaded from the clone
(MIT licence; commit 06e7fa2, nothing of it is kept here), in a plain PyTorch loop that takes everything else
from the same recipe: start weights, batches, views, optimiser and schedule. Both nets are evaluated by the
same callback. There are three lists of wrong labels, and a seed sets batches, views and, on caltech101, start
weights (Omniglot's come from a file): a run is named by both. Finished runs are not repeated. Results:
``docs/benchmarks/prism_peer_runs.csv`` and the table in ``docs/benchmarks.md`` between its markers.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from noise_settings import Setting, command, settings
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
from torch import Tensor, nn

from lightning_nrml.cli.app import NRMLCLI
from lightning_nrml.modules import MetricLearning

SIDES = {"ours": "ours", "official": "official code"}
METHODS = {"none": "no filter", "prism_avg": "PRISM AvgSim"}
SETTINGS = ("caltech101_50", "omniglot_50")
LISTS = (0, 1, 2)
COLUMNS = {
    "val/recall@1": "Recall@1",
    "val/map@r": "MAP@R",
    "noise/precision": "keep precision",
    "noise/recall": "keep recall",
}


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """The official code asks for a GPU wherever it makes a tensor; all runs are on the CPU, as ours are."""
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


def official(clone: Path, file: str, name: str) -> Any:
    """A class of the official code, without the rest of its package and what that needs."""
    registry = SimpleNamespace(register=lambda _: lambda made: made)
    stubs = {"losses.registry": {"LOSS": registry}, "utils.log_info": {"log_info": {}}}
    for path, content in stubs.items():
        parts = ["ret_benchmark", *path.split(".")]
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), ModuleType(parts[depth - 1]))
        vars(sys.modules[".".join(parts)]).update(content)
    source = clone / "ret_benchmark" / file
    spec = importlib.util.spec_from_file_location(f"official_{source.stem}", source)
    if spec is None or spec.loader is None or not source.exists():
        raise FileNotFoundError(f"{source} does not exist: --official must be a clone of the official code.")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


class OfficialMCL(nn.Module):
    """Batch and memory loss of the official trainer, with its filter or without, around our net.

    Args:
        ours: the recipe's module: backbone, head, and the size and weight of the memory.
        clone: the official code. prism: whether its filter is on.
        classes, rate, warmup: of the setting. window: batches over which the threshold is smoothed.
    """

    def __init__(
        self, ours: MetricLearning, clone: Path, prism: bool, setting: Setting, window: int = 30
    ) -> None:
        super().__init__()
        assert ours.memory is not None
        self.net, self.prism, self.weight = ours, prism, ours.memory_weight
        noise = SimpleNamespace(NOISE_RATE=setting.rate, WINDOW_SIZE=window, WARM_UP=setting.warmup)
        config = SimpleNamespace(
            NAME="nrml",
            NOISE=noise,
            num_classes=setting.classes,
            MODEL=SimpleNamespace(HEAD=SimpleNamespace(DIM=ours.embedding_dim)),
            XBM=SimpleNamespace(SIZE=ours.memory.size),
        )
        loss = ("memory_contrastive_loss_w_PRISM", "MemoryContrastiveLossPRISM")
        file, name = loss if prism else ("contrastive_loss", "ContrastiveLoss")
        self.criterion = official(clone, f"losses/{file}.py", name)(config)
        self.memory = official(clone, "modeling/xbm.py", "XBM")(config)
        self.kept: dict[int, list[Tensor]] = {}

    def loss(self, batch: Any, views: list[Tensor], epoch: int, step: int, steps: int) -> Tensor:
        """As the official trainer's step; the memory is written before it without a filter, else after."""
        z, label = self.net.embed(views[0]), batch["label"]
        if not self.prism:
            self.memory.enqueue_dequeue(z.detach(), label)
            return self.criterion(z, label, z, label) + self.weight * self.criterion(
                z, label, *self.memory.get()
            )
        memory_loss, keep = self.criterion(z, label, *self.memory.get())
        self.pending = z.detach()[keep], label[keep]
        rows, kept = z[keep], label[keep]
        self.kept.setdefault(epoch, []).append(torch.stack([keep, label == batch["clean_label"]]))
        return self.criterion(rows, kept, rows, kept) + self.weight * memory_loss

    def after_step(self) -> None:
        """Enqueue what the filter kept."""
        if self.prism:
            self.memory.enqueue_dequeue(*self.pending)

    def quality(self) -> dict[str, float]:
        """Keep precision and recall over the last epoch."""
        if not self.kept:
            return {}
        keep, right = torch.cat(self.kept[max(self.kept)], dim=1)
        hits = float((keep & right).sum())
        return {"noise/precision": hits / float(keep.sum()), "noise/recall": hits / float(right.sum())}


def peer_run(method: str, setting: Setting, fit: list[str], folder: Path, clone: Path) -> None:
    """Train the official side by the recipe of ``fit``; writes ``results.json`` as a fit does."""
    cli = NRMLCLI(fit[1:], run=False)
    model = cli.model
    if model.init_weights:
        model.start_from(model.init_weights)
    cli.datamodule.setup("fit")
    with on_the_cpu():
        net = OfficialMCL(model, clone, method != "none", setting)
        Loop(cli.datamodule, model, net, cli.trainer.max_epochs).run()
    cli.trainer.validate(model, cli.datamodule, verbose=False)
    last = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {"last": last | net.quality(), "best": {}})


def arguments(setting: Setting, method: str, number: int, seed: int, folder: Path) -> list[str]:
    """The ``nrml fit`` of a run: the list's command of the noise table, other weights and batches."""
    seeds = [f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    return [*command(setting, method, number, folder), *seeds]


def job(side: str, setting: Setting, method: str, number: int, seed: int, folder: Path, clone: Path) -> Job:
    """One run of either side."""
    if side == "ours":
        return Job(folder, [arguments(setting, method, number, seed, folder)])
    fit = arguments(setting, "none", number, seed, folder)
    return Job(folder, [partial(peer_run, method, setting, fit, folder, clone)])


def collect(out: Path) -> list[dict[str, Any]]:
    """One row per finished run."""
    rows = []
    for path in sorted(out.glob("*/*/*/list*_seed*/done.json")):
        side, setting, method = path.parts[-5:-2]
        number, seed = (int(part) for part in re.findall(r"\d+", path.parent.name))
        done = json.loads(path.read_text(encoding="utf-8"))
        named = {"setting": setting, "method": method, "side": side, "list": number, "seed": seed}
        measured = {key: done["last"].get(key) for key in COLUMNS}
        rows.append(named | measured | {"cpu_seconds": done["cpu_seconds"]})
    return rows


def _gap(ours: float | None, peer: float | None) -> float | None:
    return None if ours is None or peer is None else ours - peer


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Markdown table of one setting over the runs that both sides have."""
    lines = [f"**{title}**", "", f"| | side | runs | {' | '.join(COLUMNS.values())} |"]
    lines.append("|---" * (3 + len(COLUMNS)) + "|")
    for method, said in METHODS.items():
        by = {
            side: {(r["list"], r["seed"]): r for r in rows if (r["method"], r["side"]) == (method, side)}
            for side in SIDES
        }
        both = sorted(by["ours"].keys() & by["official"].keys())
        if not both:
            continue
        for side, name in SIDES.items():
            cells = [shown([by[side][run][key] for run in both]) for key in COLUMNS]
            lines.append(f"| {said} | {name} | {len(both)} | {' | '.join(cells)} |")
        gaps = [[_gap(by["ours"][run][key], by["official"][run][key]) for run in both] for key in COLUMNS]
        lines.append(f"| | ours – official | | {' | '.join(shown(gap, '+.3f') for gap in gaps)} |")
    return "\n".join(lines) + "\n"


def publish(args: Any) -> None:
    """Write the CSV and replace the table in docs/benchmarks.md."""
    target = REPO / "docs" / "benchmarks" / "prism_peer_runs.csv"
    key = {"setting": SETTINGS, "method": list(METHODS), "side": list(SIDES), "list": LISTS, "seed": None}
    rows = with_published(target, collect(args.out), key)
    write_csv(target, rows, [*key, *COLUMNS, "cpu_seconds"])
    titles = {setting.name: setting.title for setting in settings(args.data)}
    of = {name: [row for row in rows if row["setting"] == name] for name in SETTINGS}
    parts = [table(titles[name], of[name]) for name in SETTINGS if of[name]]
    replace_tables(REPO / "docs" / "benchmarks.md", "prism peer tables", "\n".join(parts))


def main() -> None:
    """Parse arguments, run what is missing, publish."""
    options = parser(__doc__, "prism_peer", METHODS, METHODS)
    options.add_argument("--official", type=Path, required=True, help="clone of the official code")
    options.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options.add_argument("--lists", type=int, nargs="+", choices=LISTS, default=list(LISTS))
    options.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    options.add_argument("--jobs", type=int, default=1)
    args = options.parse_args()
    args.data, args.out, args.official = args.data.resolve(), args.out.resolve(), args.official.resolve()
    jobs = []
    for seed in args.seeds:
        for setting in settings(args.data):
            if setting.name in args.settings:
                for number in args.lists:
                    for method in args.methods:
                        for side in args.sides:
                            name = f"list{number}_seed{seed}"
                            folder = args.out / side / setting.name / method / name
                            jobs.append(job(side, setting, method, number, seed, folder, args.official))
    run_missing(jobs, args.out, args.jobs)
    publish(args)


if __name__ == "__main__":
    main()
