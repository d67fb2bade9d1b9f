"""What runs in every training step stays on the GPU and never waits for it, shown without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_gpu import WaitsForDevice, fake_gpu
from filter_cases import CLASSES, DIM, FILTERS, MULTI_LABEL, ROWS, STEPS
from torch import Tensor, nn

from lightning_nrml import filters, losses, modules
from lightning_nrml.data import views
from lightning_nrml.filters import NoiseFilter
from lightning_nrml.memory import FeatureBank, FeatureQueue, LabelLedger, SampleLedger
from lightning_nrml.metrics import FilterQuality
from lightning_nrml.types import FilterContext, Selection

SAMPLES = ROWS * STEPS
NET: dict[str, Any] = {
    "backbone": "conv4",
    "backbone_kwargs": {"input_size": 8, "widths": [8, 16], "strides": [1, 2]},
    "in_channels": 1,
    "check_finite": False,  # it reads the loss, which is its purpose
}


def context(multi_label: bool = False) -> FilterContext:
    shape = (ROWS, CLASSES) if multi_label else (ROWS,)
    cuda = torch.device("cuda")
    return FilterContext(
        embedding=torch.randn(ROWS, DIM, device=cuda),
        label=torch.randint(2 if multi_label else CLASSES, shape, device=cuda),
        index=torch.arange(ROWS, device=cuda),
        logits=torch.randn(ROWS, CLASSES, device=cuda),
        per_sample_loss=torch.rand(shape, device=cuda),
        proxies=torch.randn(CLASSES, DIM, device=cuda),
        teacher=torch.randn(ROWS, DIM, device=cuda),
    )


VARIANTS: dict[str, Callable[[], NoiseFilter]] = {
    "prism_class_kappa": lambda: filters.PRISM(
        CLASSES, DIM, memory_size=32, similarity="vmf", warmup_steps=2, count_empty_classes=True
    ),
    "consensus_told": lambda: filters.Consensus(CLASSES, DIM, SAMPLES, noise_rate=0.3),
    "knn_threshold": lambda: filters.KNNVote(CLASSES, DIM, k=3, memory_size=32, threshold=0.5),
}
EVERY = {**FILTERS, **MULTI_LABEL, **VARIANTS}


def made(make: Callable[[], Any]) -> Any:
    """The module on the fake GPU; filled rings, as only a ring that is not full yet is asked for its size."""
    part = on_gpu(make())
    for ring in part.modules():
        if isinstance(ring, FeatureQueue):
            ring._full = True
    return part


def on_gpu(part: nn.Module) -> nn.Module:
    """``part`` with its tensors on the fake GPU (``.to`` cannot exchange a parameter for a fake one)."""
    for owner in part.modules():
        for key, value in owner._parameters.items():
            if value is not None:
                fake = nn.Parameter(torch.empty_like(value, device="cuda"), value.requires_grad)
                owner._parameters[key] = fake
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[key] = torch.empty_like(buffer, device="cuda")
    return part


def test_the_fake_gpu_refuses_what_it_should() -> None:
    with fake_gpu():
        x = torch.zeros(4, device="cuda")
        assert (x + 1).device.type == "cuda"
        assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))  # the CPU computes
        x[:2].copy_(torch.ones(2), non_blocking=True)
        waits: list[Callable[[], Any]] = [
            lambda: float(x.sum()),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: x[x.argmax()],
            lambda: x.cpu(),
            lambda: x.new_tensor(0.5),
            lambda: torch.tensor(1.0, device="cuda"),
            lambda: torch.ones(2).to("cuda"),
        ]
        for wait in waits:
            with pytest.raises(WaitsForDevice):
                wait()
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(4)


@pytest.mark.parametrize("name", EVERY)
def test_filters(name: str) -> None:
    with fake_gpu():
        part = made(EVERY[name])
        for _ in range(3):
            ctx = context(name in MULTI_LABEL)
            selection = part.select(ctx)
            part.update(ctx, selection)
            assert {x.device.type for x in (selection.weight, selection.score, selection.threshold)} == {
                "cuda"
            }
        if "epoch" in part.granularities and not name.startswith("consensus"):
            assert part.score(ctx).device.type == "cuda"


def test_memories_and_the_quality_of_a_filter() -> None:
    with fake_gpu():
        ctx, many = context(), context(multi_label=True)
        keep = Selection.keep_all(ctx.label).keep
        ring = made(lambda: FeatureQueue(32, DIM))
        ring.enqueue(ctx.embedding, ctx.label, ctx.index, keep)
        assert ring.get()[0].shape == (32, DIM)
        made(lambda: FeatureBank(SAMPLES, DIM)).write(ctx.index, ctx.embedding, 0, keep)
        ledger = SampleLedger(SAMPLES)
        ledger.allow_corrections()
        on_gpu(ledger)
        ledger.record(ctx.index, keep.float(), ctx.per_sample_loss, ctx.label)
        ledger.correct(ctx.index, ctx.label)
        made(lambda: LabelLedger(SAMPLES, CLASSES)).record(many.index, many.label.float(), many.logits)
        quality = FilterQuality()
        quality.counts = quality.counts.to("cuda", non_blocking=True)
        quality.update(keep, ctx.label > 3, ctx.per_sample_loss)


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "contrastive": losses.ContrastiveLoss,
    "supcon": losses.SupConLoss,
    "softmax": lambda: losses.CosineSoftmaxLoss(CLASSES, DIM),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    with fake_gpu():
        ctx = context()
        assert made(LOSSES[name])(ctx.embedding, ctx.label, ctx.per_sample_loss).device.type == "cuda"


MODULES: dict[str, tuple[Callable[[], modules.EmbeddingModule], Callable[[], views.Views]]] = {
    "metric": (
        lambda: modules.MetricLearning(embedding_dim=DIM, memory_size=32, **NET),
        lambda: views.MetricView(8),
    ),
    "simclr": (lambda: modules.SimCLR(**NET), lambda: views.SimCLRViews(8)),
    "moco": (lambda: modules.MoCo(queue_size=64, **NET), lambda: views.MoCoViews(8)),
    "mochi": (
        lambda: modules.MoCHi(
            queue_size=64, num_hard=16, num_mixed=4, num_query_mixed=4, warmup_epochs=0, **NET
        ),
        lambda: views.MoCoViews(8),
    ),
    "byol": (lambda: modules.BYOL(**NET), lambda: views.BYOLViews(8)),
    "swav": (
        lambda: modules.SwAV(num_prototypes=20, queue_size=32, queue_start_epoch=0, **NET),
        lambda: views.MultiCropViews(8, small_crops=0),
    ),
    "eac": (lambda: modules.EAC(num_classes=CLASSES, **NET), lambda: views.EACViews(8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_training_steps_with_their_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, view = MODULES[name]
    image = torch.randint(256, (ROWS, 1, 8, 8), dtype=torch.uint8)
    with fake_gpu():
        module: Any = made(make)
        seen: dict[str, Tensor] = {}
        monkeypatch.setattr(module, "log", lambda key, value, **_: seen.update({key: value}))
        if name == "metric":
            module.filters["prism"] = made(FILTERS["prism_avg"])
            module.filters.mode["prism"] = "batch"
        made_views = on_gpu(view())(image.to("cuda", non_blocking=True), views.ViewKey(1))
        ctx = context()
        batch = {"image": made_views[0], "views": made_views, "label": ctx.label, "index": ctx.index}
        out = module.training_step(batch, 0)
        module.on_after_backward()
        assert out["loss"].device.type == "cuda"
        assert {value.device.type for value in seen.values()} == {"cuda"}
        if name == "metric":
            assert module.filters.commit() is not None
