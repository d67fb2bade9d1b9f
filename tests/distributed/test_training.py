"""Whole training on two ranks with batch B equals one process with batch 2B, by hand and in Lightning."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import digits, module, state_of, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_nrml import distributed
from lightning_nrml.callbacks import PRISM, NoiseFilterCallback, RetrievalEvaluator
from lightning_nrml.filters import PRISM as PRISMFilter
from lightning_nrml.filters import FixedFilter, NoiseFilter
from lightning_nrml.memory import SampleLedger
from lightning_nrml.modules import MetricLearning
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig
from lightning_nrml.types import FilterContext, Selection

ROWS, STEPS, CLASSES = 16, 6, 4  # rows of the whole batch


def norm_free(**kwargs: Any) -> MetricLearning:
    """Batch norm sees one rank only, so the nets here have group norm. SGD: Adam would blow up rounding."""
    net = module(
        **{
            "optimizer": OptimizerConfig("sgd", 0.05),
            "schedule": ScheduleConfig("cosine", 2),
            **kwargs,
        }
    )
    body = net.backbone.body
    for place, layer in enumerate(body):
        if isinstance(layer, nn.BatchNorm2d):
            body[place] = nn.GroupNorm(4, layer.num_features)
    return net


# ---- by hand ------------------------------------------------------------------------------------------


def synthetic() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    label = torch.arange(STEPS * ROWS) % CLASSES
    pattern = torch.randn(CLASSES, 1, 8, 8, generator=generator)
    image = pattern[label] + 0.7 * torch.randn(len(label), 1, 8, 8, generator=generator)
    wrong = torch.rand(len(label), generator=generator) < 0.3
    return image.double(), torch.where(wrong, (label + 1) % CLASSES, label)


def steps_by_hand(options: dict[str, Any], drop: list[int]) -> dict[str, Any]:
    """Six SGD steps with PRISM (active from the third) and a mask; gradients are averaged as DDP does."""
    image, label = synthetic()
    net = norm_free(memory_size=40).double()
    mask = torch.ones(len(label), dtype=torch.bool)
    mask[drop] = False
    net.filters["prism"] = PRISMFilter(CLASSES, 16, 0.3, memory_size=60, window=3, warmup_steps=2, **options)
    net.filters["fixed"] = FixedFilter(mask)
    net.filters.mode.update(prism="batch", fixed="batch")
    net.noise_ledger = SampleLedger(len(label))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    world, share = distributed.world_size(), ROWS // distributed.world_size()
    losses, gradients, kept = [], [], []
    for step in range(STEPS):
        first = step * ROWS + distributed.rank() * share
        index = torch.arange(first, first + share)
        batch = {"image": image[index], "label": label[index], "index": index}
        out = net.training_step(batch, step)
        optimizer.zero_grad()
        out["loss"].backward()
        assert all(p.grad is not None for p in net.parameters())
        for p in net.parameters():
            p.grad = distributed.mean_over_ranks(p.grad)
        gradients.append({n: p.grad.clone() for n, p in net.named_parameters()})
        net.on_after_backward()
        ctx, selection = net.filters.commit()
        net.noise_ledger.record(ctx.index, selection.weight, selection.score)
        optimizer.step()
        losses.append(float(distributed.mean_over_ranks(out["loss"])))
        kept.append(selection.keep)
        assert torch.equal(
            out["selection"].keep, selection.rows(slice(first % ROWS, first % ROWS + share)).keep
        )
    assert world in (1, 2)
    return {"loss": losses, "gradient": gradients, "keep": torch.stack(kept), "state": state_of(net)}


DROPS = {
    "nothing": [],
    "rank 0 in one step": range(3 * ROWS, 3 * ROWS + ROWS // 2),
    "rank 1 in one step": range(3 * ROWS + ROWS // 2, 4 * ROWS),
    "everything in two steps, the first too": [*range(ROWS), *range(4 * ROWS, 5 * ROWS)],
}


@pytest.mark.parametrize("drop", list(DROPS))
@pytest.mark.parametrize("similarity", ["avg", "vmf"])
def test_steps_on_two_ranks_equal_one_process(gloo_pool, similarity, drop):
    arguments = {"similarity": similarity}, list(DROPS[drop])
    torch.manual_seed(0)
    want = steps_by_hand(*arguments)
    zero, one = gloo_pool.run(steps_by_hand, *arguments)
    assert 0 < want["keep"][2].sum() < ROWS, "PRISM decides something"
    for key, value in zero["state"].items():
        assert torch.equal(value.nan_to_num(), one["state"][key].nan_to_num()), f"{key} differs between ranks"
    for got in (zero, one):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-9)
        assert torch.equal(got["keep"], want["keep"])
        for step, gradient in enumerate(want["gradient"]):
            for name, value in gradient.items():
                torch.testing.assert_close(got["gradient"][step][name], value, rtol=1e-7, atol=1e-10)
        for key, value in want["state"].items():
            exact = not value.is_floating_point()
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(got["state"][key], value, equal_nan=True, **tolerance)


# ---- in Lightning -------------------------------------------------------------------------------------


class Positional(NoiseFilter):
    """Drops by place in the global batch: rank 0's half, rank 1's half, everything, nothing, in turn."""

    def select(self, ctx: FilterContext) -> Selection:
        keep = torch.ones(len(ctx), dtype=torch.bool)
        half = len(ctx) // 2
        keep[[slice(0, half), slice(half, None), slice(None), slice(0, 0)][ctx.step % 4]] = False
        return Selection(keep.float(), torch.full((len(ctx),), torch.nan), torch.tensor(torch.nan))


CASES: dict[str, Any] = {
    "avg": lambda: PRISM(0.5, warmup_steps=4, window=4),
    "vmf": lambda: PRISM(0.5, similarity="vmf", shared_kappa=True),
    "epoch": lambda: PRISM(0.5, granularity="epoch", max_age=1),
    "positional": lambda: NoiseFilterCallback(Positional()),
    "no filter": lambda: None,
}


class Curve(L.Callback):
    """Losses and keep rates of all steps as logged, and what DDP was told to leave alone."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []
        self.ignored: set[str] = set()
        self.wrapped = ""

    def on_train_start(self, trainer, pl_module) -> None:
        self.wrapped = type(trainer.strategy.model).__name__
        if self.wrapped == "DistributedDataParallel":
            self.ignored = trainer.strategy.model.parameters_to_ignore

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        seen = trainer.callback_metrics
        self.values.append((float(seen["train/loss"]), float(seen.get("train/keep_rate", 1.0))))


class Writes(ModelCheckpoint):
    """Counts the files that this process writes."""

    count = 0

    def _save_checkpoint(self, trainer, filepath) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.count += trainer.is_global_zero


class Stop(L.Callback):
    """Ends the run after some epochs without changing its planned length (and so its schedule)."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def fit(
    folder: Path,
    name: str,
    epochs: int = 2,
    resume: str | None = None,
    precision: str = "64-true",
    **options: Any,
) -> dict[str, Any]:
    """Digits by Lightning: in one process, or as one rank of the process group that is there."""
    world = distributed.world_size()
    if world > 1:  # Lightning takes the group that is there and launches nothing
        os.environ.update(
            LOCAL_RANK=str(distributed.rank()), NODE_RANK="0", WORLD_SIZE="2", RANK=str(distributed.rank())
        )
        options = {"strategy": "ddp", "devices": 2, **options}
    net = norm_free()
    plug, curve, writes = CASES[name](), Curve(), Writes(folder, "{epoch}", save_top_k=-1)
    callbacks = [RetrievalEvaluator(), curve, writes, Stop(epochs), *([plug] if plug else [])]
    diet = {"m_per_class": None, "epoch_length": None} if name == "epoch" else {"m_per_class": 8}
    ranks = options.get("devices", 1)  # more than ``world`` where Lightning has yet to launch the others
    data = digits(batch_size=64 // ranks, eval_batch_size=100, **diet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(folder, 2, callbacks, precision=precision, **options)
        run.fit(net, data, ckpt_path=resume)
    return {
        "state": state_of(net),
        "metrics": {k: float(v) for k, v in run.callback_metrics.items()},
        "curve": torch.tensor(curve.values),
        "writes": writes.count,
        "steps": run.global_step,
        "warnings": [str(w.message) for w in caught],
        "wrapped": curve.wrapped,
        "ignored": curve.ignored,
        "buffers": {name for name, _ in net.named_buffers()},
    }


def assert_same_run(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    assert got["steps"] == want["steps"]
    torch.testing.assert_close(got["curve"], want["curve"], rtol=tolerance, atol=tolerance)
    assert got["metrics"] == pytest.approx(want["metrics"], rel=tolerance, abs=tolerance, nan_ok=True)
    assert got["state"].keys() == want["state"].keys()
    for key, value in want["state"].items():
        exact = not value.is_floating_point()
        close = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(
            got["state"][key], value, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}", **close
        )


@pytest.mark.parametrize("name", list(CASES))
def test_lightning_on_two_ranks_equals_one_process(gloo_pool, tmp_path, name):
    want = fit(tmp_path / "one", name)
    zero, one = gloo_pool.run(fit, tmp_path / "two", name)
    assert zero["wrapped"] == one["wrapped"] == "DistributedDataParallel"
    assert zero["ignored"] == one["ignored"] == zero["buffers"]  # without batch norm all buffers are memories
    assert len(zero["ignored"]) == len(want["state"]) - len(list(norm_free().parameters()))
    for key, value in zero["state"].items():
        assert torch.equal(value.nan_to_num(), one["state"][key].nan_to_num()), f"{key} differs between ranks"
    for got in (zero, one):
        assert_same_run(got, want, 1e-6)
        noise = [w for w in got["warnings"] if re.search("sync_dist|torch.distributed|sampler", w)]
        assert noise == []
    assert [zero["writes"], one["writes"]] == [2, 0]
    if name in ("avg", "vmf"):
        assert 0.3 < want["metrics"]["train/keep_rate"] < 0.9
        assert 0 < want["metrics"]["noise/auroc"] <= 1


@pytest.mark.parametrize("name", ["avg", "epoch"])
def test_resume_on_two_ranks_equals_the_uninterrupted_run(gloo_pool, tmp_path, name):
    # in single precision: Lightning restores double weights before it makes the module double
    single = "32-true"
    whole, _ = gloo_pool.run(fit, tmp_path / "whole", name, 2, None, single)
    gloo_pool.run(fit, tmp_path / "half", name, 1, None, single)
    last = str(tmp_path / "half" / "epoch=0.ckpt")
    for got in gloo_pool.run(fit, tmp_path / "half", name, 2, last, single):
        assert got["steps"] == whole["steps"]
        for key, value in whole["state"].items():
            assert torch.equal(got["state"][key].nan_to_num(), value.nan_to_num()), key
        half = len(whole["curve"]) - len(got["curve"])
        assert torch.equal(got["curve"], whole["curve"][half:])
        for key, value in whole["metrics"].items():
            assert got["metrics"][key] == pytest.approx(value, abs=0, nan_ok=True)


def one_bad_rank() -> str:
    """Rank 1 meets a NaN: both must stop, and both must name its sample."""
    net = norm_free(memory_size=0)
    image, label = synthetic()
    index = torch.arange(4) + 10 * distributed.rank()
    batch = {"image": image[index].float(), "label": label[index], "index": index}
    if distributed.rank() == 1:
        batch["image"][2] = torch.nan
    try:
        net.training_step(batch, 0)
    except FloatingPointError as error:
        return str(error)
    return "went on"


def test_a_bad_loss_on_one_rank_stops_both(gloo_pool):
    for message in gloo_pool.run(one_bad_rank):
        assert "not finite for dataset indices [12]" in message


LAUNCHED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import torch, test_training
if __name__ == "__main__":
    for name in ("avg", "epoch"):
        folder = Path(sys.argv[3]) / name
        result = test_training.fit(folder, name, strategy="ddp", devices=2)
        torch.save(result, folder / f"rank{test_training.distributed.rank()}.pt")
"""


@pytest.mark.slow
def test_processes_that_lightning_launches_equal_one_process(tmp_path):
    """The whole road: ``strategy="ddp"`` starts its second process.

    In float64: in single precision one of 500 queries may find another neighbour.
    """
    here = Path(__file__).resolve().parent
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED)
    paths = [str(here.parent), str(here)]
    clean = {
        k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE")
    }
    env = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
    command = [sys.executable, str(script), *paths, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sync_dist" not in done.stderr
    assert "deprecated" not in done.stderr.replace("LeafSpec)` is deprecated", "")
    for name in ("avg", "epoch"):
        want = fit(tmp_path / "one" / name, name)
        zero, one = (torch.load(tmp_path / name / f"rank{r}.pt") for r in (0, 1))
        assert zero["wrapped"] == "DistributedDataParallel"
        assert [zero["writes"], one["writes"]] == [2, 0]
        for key, value in zero["state"].items():
            assert torch.equal(value.nan_to_num(), one["state"][key].nan_to_num()), key
        assert_same_run(zero, want, 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_ranks_that_are_all_told_to_stop_stop_together(number, name, tmp_path):
    """As ``scancel``, ``timeout`` and terminals do: none hangs, the step is saved, the exit code says why."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE")
    }
    env = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    model = ["--model=MetricLearning", "--model.backbone=pixels", "--model.embedding_dim=8"]
    model += ["--model.backbone_kwargs={input_size: 8}", "--model.schedule.warmup_steps=0"]
    data = ["--data=DigitsDataModule", "--data.batch_size=32", "--data.m_per_class=8"]
    trainer = ["accelerator=cpu", "devices=2", "strategy=ddp", "max_epochs=100000", "limit_val_batches=0"]
    run = [*(f"--trainer.{option}" for option in trainer), f"--trainer.default_root_dir={tmp_path}"]
    command = [sys.executable, "-m", "lightning_nrml", "fit", *model, *data, *run]
    with (tmp_path / "log").open("w") as log:
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True, preexec_fn=heard
        )
        try:
            last = tmp_path / "checkpoints" / "last.ckpt"
            wait_for(lambda: last.is_file() or process.poll() is not None)
            assert last.is_file()
            first = torch.load(last, weights_only=True)["global_step"]
            os.killpg(process.pid, number)
            assert process.wait(timeout=300) == 128 + number
            wait_for(lambda: (tmp_path / "log").read_text().count(f"stopped by {name}") == 2)
            assert torch.load(last, weights_only=True)["global_step"] > first
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(what):
    """Until it is so, for five minutes: on a loaded machine two processes take long to begin."""
    end = time.monotonic() + 300
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)
