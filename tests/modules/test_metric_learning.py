"""MetricLearning: its loss from the formula, its memory, and its checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_state, digits, module, state_of, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.callbacks import PRISM, KnownClean, RetrievalEvaluator
from lightning_nrml.losses import ContrastiveLoss, CosineSoftmaxLoss, Loss, MarginLoss, PMLLoss, SupConLoss
from lightning_nrml.models import create_head
from lightning_nrml.modules import MetricLearning
from lightning_nrml.modules.arguments import as_loss
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig
from lightning_nrml.types import FilterContext, Selection


def images(n: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    label = torch.arange(n) % 3
    return {"image": torch.rand(n, 1, 8, 8, generator=generator), "label": label, "index": torch.arange(n)}


def contrastive(z: Tensor, y: Tensor, keys: Tensor, key_label: Tensor, margin: float, own: bool) -> float:
    """Sum of pair terms by two loops, before any normalisation."""
    total = 0.0
    for i in range(len(z)):
        for j in range(len(keys)):
            s = float(z[i] @ keys[j])
            if y[i] == key_label[j] and not (own and i == j) and s < 1 - 1e-5:
                total += 1 - s
            elif y[i] != key_label[j] and s > margin:
                total += s
    return total


# ---- loss and memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_batch_plus_weighted_memory_loss(weighted: bool) -> None:
    net = module(memory_size=20, memory_weight=0.3, memory_margin=0.2, loss=ContrastiveLoss(0.4)).eval()
    batch = images()
    memory, memory_label = F.normalize(torch.randn(7, 16), dim=1), torch.arange(7) % 3
    net.memory.enqueue(memory, memory_label, torch.arange(7))
    out = net.step(batch)
    keep = torch.tensor([True, True, False] * 4) if weighted else torch.ones(12, dtype=torch.bool)
    got = out.loss_fn(keep.float() if weighted else None)
    z, y = F.normalize(out.embedding.detach(), dim=1)[keep], batch["label"][keep]
    batch_loss = contrastive(z, y, z, y, 0.4, True) / int(keep.sum())
    memory_loss = contrastive(z, y, memory, memory_label, 0.2, False) / 12
    assert float(got["batch_loss"]) == pytest.approx(batch_loss, rel=1e-5)
    assert float(got["memory_loss"]) == pytest.approx(memory_loss, rel=1e-5)
    assert float(got["loss"]) == pytest.approx(batch_loss + 0.3 * memory_loss, rel=1e-5)
    torch.testing.assert_close(net.embed(batch["image"]).norm(dim=1), torch.ones(12))


def test_memory_takes_kept_finite_rows_in_order() -> None:
    net = module(memory_size=10)
    z = F.normalize(torch.randn(6, 16), dim=1)
    z[4] = torch.nan
    ctx = FilterContext(z, torch.arange(6), torch.arange(6) + 100)
    keep = torch.tensor([1.0, 0.49, 0.5, 1.0, 1.0, 1.0])  # soft weights: from one half on
    net.remember(ctx, Selection(keep, keep, keep[0]))
    assert net.memory.index[:4].tolist() == [100, 102, 103, 105]
    assert torch.equal(net.memory.get()[0], z[[0, 2, 3, 5]])
    assert int(net.memory.count) == 4


def test_memory_loss_starts_when_told_but_fills_from_the_start(tmp_path: Path) -> None:
    run = trainer(tmp_path, 1, limit_val_batches=0, limit_train_batches=5)
    run.fit(early := module(memory_start=5), digits())
    assert "train/memory_loss" not in run.callback_metrics
    assert int(early.memory.count) == 100
    run = trainer(tmp_path, 1, limit_val_batches=0, limit_train_batches=6)
    run.fit(module(memory_start=5), digits())
    values = {k: float(v) for k, v in run.callback_metrics.items()}
    assert values["train/memory_loss"] > 0
    assert values["train/loss"] == pytest.approx(
        values["train/batch_loss"] + 0.1 * values["train/memory_loss"], rel=1e-5
    )


def test_without_memory_and_filter_nothing_is_gathered_or_remembered(tmp_path: Path) -> None:
    net = module(memory_size=0)
    trainer(tmp_path, 1, limit_val_batches=0).fit(net, digits())
    assert net.memory is None
    assert net._pending is None
    assert not [k for k in net.state_dict() if k.startswith("memory")]


def test_parameters_of_the_loss_have_their_own_learning_rate(tmp_path: Path) -> None:
    net = module(
        loss=CosineSoftmaxLoss(10, 16),
        optimizer=OptimizerConfig("sgd", 0.1, loss_lr=0.7),
        schedule=ScheduleConfig("constant", 0),
    )
    run = trainer(tmp_path, 1, limit_val_batches=0)
    run.fit(net, digits())
    groups = {g["lr"]: g["params"] for g in run.optimizers[0].param_groups}
    assert groups.keys() == {0.1, 0.7}
    assert [p.shape for p in groups[0.7]] == [(10, 16)]
    assert net.step(images()).logits.shape == (12, 10)


def test_heads() -> None:
    x = torch.randn(5, 8)
    assert create_head("mlp", 8, 3)(x).shape == (5, 3)
    none = module(head="none", embedding_dim=16 * 16)  # 16 channels on 4 x 4 places
    assert none.step(images()).embedding.shape == (12, 256)
    with pytest.raises(ValueError, match="embedding_dim = 256"):
        module(head="none", embedding_dim=16)


# ---- checkpoints --------------------------------------------------------------------------------------


class TwoMargins(Loss):
    """A user's loss that keeps its arguments under other names: a checkpoint cannot know them."""

    def __init__(self, low: float = 0.0) -> None:
        super().__init__()
        self.margin = low

    def forward(self, embedding: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        return (embedding.square().mean() - self.margin).abs()


LOSSES: dict[str, Any] = {
    "default": None,
    "contrastive": lambda: ContrastiveLoss(0.25),
    "supcon": lambda: SupConLoss(0.2, base_temperature=0.1, empty_positive="drop"),
    "softmax": lambda: CosineSoftmaxLoss(10, 16, scale=8.0),
    "softmax without sizes": lambda: CosineSoftmaxLoss(scale=8.0),
    "pml without sizes": lambda: PMLLoss("ArcFaceLoss"),
    "margin": lambda: MarginLoss(0.1, 1.1, 0.01, num_classes=10, nonzero_loss_cutoff=1.2),
    "pml": lambda: PMLLoss(
        "ArcFaceLoss", miner="MultiSimilarityMiner", miner_kwargs={"epsilon": 0.2}, num_classes=10,
        embedding_size=16, margin=20.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LOSSES))
def test_checkpoint_made_from_python_loads_with_lightnings_defaults(tmp_path: Path, name: str) -> None:
    loss = LOSSES[name]() if LOSSES[name] else None
    net, data = module(loss=loss, num_classes=10, memory_margin=0.3), digits()
    saver = ModelCheckpoint(tmp_path, "last")
    run = trainer(tmp_path, 2, [PRISM(0.5), RetrievalEvaluator(), saver])
    run.fit(net, data)
    path = tmp_path / "last.ckpt"
    torch.load(path, weights_only=True)  # plain values only: readable without this package

    again = MetricLearning.load_from_checkpoint(path)
    own = {k: v for k, v in state_of(net).items() if not k.startswith(("filters", "noise_ledger"))}
    assert_same_state(own, state_of(again))
    assert type(again.loss) is type(net.loss)
    assert again.loss.arguments() == net.loss.arguments()
    assert asdict(again.optimizer_config) == asdict(net.optimizer_config)
    assert asdict(again.schedule_config) == asdict(net.schedule_config)
    assert again.memory_loss.neg_margin == 0.3
    assert again.hparams == net.hparams
    image = images()["image"]
    assert torch.equal(again.eval()(image), net.eval()(image))

    found = trainer(tmp_path, 2, [RetrievalEvaluator()]).test(again, data, ckpt_path=path, verbose=False)[0]
    assert found["test/recall@1"] == pytest.approx(float(run.callback_metrics["val/recall@1"]))
    resumed = MetricLearning.load_from_checkpoint(path)
    more = trainer(tmp_path, 3, [PRISM(0.5)])
    more.fit(resumed, data, ckpt_path=path)
    assert more.global_step == 24
    assert int(resumed.noise_ledger.seen.sum()) == 3 * 256


def test_checkpoint_of_a_run_by_epoch_loads_without_its_callback(tmp_path: Path) -> None:
    net = module()
    callbacks = [KnownClean(granularity="epoch"), ModelCheckpoint(tmp_path, "last")]
    trainer(tmp_path, 1, callbacks, limit_val_batches=0).fit(net, digits())
    again = MetricLearning.load_from_checkpoint(tmp_path / "last.ckpt")
    assert not [k for k in again.state_dict() if k.startswith(("filters", "noise_ledger", "feature_bank"))]
    assert torch.equal(again.head.weight, net.head.weight)


def test_a_loss_that_cannot_be_rebuilt_is_asked_for(tmp_path: Path) -> None:
    net = module(loss=TwoMargins(0.5))
    trainer(tmp_path, 1, [ModelCheckpoint(tmp_path, "last")], limit_val_batches=0).fit(net, digits())
    with pytest.raises(ValueError, match=r"TwoMargins of the checkpoint cannot be rebuilt: pass it"):
        MetricLearning.load_from_checkpoint(tmp_path / "last.ckpt")
    again = MetricLearning.load_from_checkpoint(tmp_path / "last.ckpt", loss=TwoMargins(0.5))
    assert torch.equal(again.head.weight, net.head.weight)
    with pytest.raises(ValueError, match=r"os\.system of the checkpoint cannot be rebuilt"):
        as_loss({"class_path": "os.system", "init_args": {}})


class Wrapped(MetricLearning):
    """A subclass with arguments of its own, a module among them."""

    def __init__(self, width: int, extra: torch.nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(
            "conv4", {"input_size": 8, "widths": (width,), "strides": (2,)}, 1, embedding_dim=width, **kwargs
        )
        self.extra = extra


def test_a_subclass_saves_its_own_arguments(tmp_path: Path) -> None:
    net = Wrapped(8, torch.nn.Linear(2, 2), memory_size=64, init_weights=None)
    assert dict(net.hparams) == {"width": 8, "memory_size": 64}
    trainer(tmp_path, 1, [ModelCheckpoint(tmp_path, "last")], limit_val_batches=0).fit(net, digits())
    again = Wrapped.load_from_checkpoint(tmp_path / "last.ckpt", extra=torch.nn.Linear(2, 2))
    assert torch.equal(again.extra.weight, net.extra.weight)
    assert again.memory.size == 64
