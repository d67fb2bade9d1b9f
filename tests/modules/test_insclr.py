"""InsCLR: the step against its formula in float64, life cycle of pool and memory, resume, odd data."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same_state, state_of, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.data.views import InsCLRViews, ViewKey
from lightning_nrml.memory.mining import mine
from lightning_nrml.metrics.search import topk_search
from lightning_nrml.modules import InsCLR, MetricLearning
from lightning_nrml.modules.full_pass import embed_train_split, evaluating
from lightning_nrml.types import FilterContext, Selection

sys.path.insert(0, str(Path(__file__).parent))
from insclr_runs import DIGITS, batch_of, digits, module, prepared


def slow_loss(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, margin: float = 0.4) -> Tensor:
    """Step 4 of the method, pair by pair, on unit rows in float64."""
    total = x1.new_zeros(())
    for i in range(len(x1)):
        for j in range(len(x2)):
            s = x1[i] @ x2[j]
            if y1[i] == y2[j] and s < 1 - 1e-6:
                total = total + 1 - s
            if y1[i] != y2[j] and s > margin:
                total = total + s
    return total / len(x1)


# ---- the step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["base", "impr"])
def test_step_is_batch_loss_plus_memory_loss_with_their_gradients(stage: str) -> None:
    net, image = prepared(module(stage=stage, memory_weight=0.7, exclude_nearest=6, margin=0.3))
    batch = batch_of(net, image, [0, 9, 18, 27])
    out = net.step(batch)
    parts = out.loss_fn(None)

    twin, _ = prepared(module(stage=stage, exclude_nearest=6))
    z = F.normalize(twin.head(twin.backbone(batch["image"])).double(), dim=1)
    label = torch.arange(1, 5).repeat_interleave(4)
    if stage == "impr":
        twin.eval()
        plain = F.normalize(twin.head(twin.backbone(batch["views"][1])), dim=1).detach().view(4, 4, -1)
        for g in range(4):
            for k in range(1, 4):
                if float(plain[g, 0] @ plain[g, k]) < 0.65:
                    label[4 * g + k] = -(g + 1)
        near, similarity = twin.pool.of(batch["index"].view(4, 4))
        rows, claim = mine(
            batch["index"].view(4, 4), label.view(4, 4) > 0, plain, near, similarity,
            twin.plain_bank.embedding, twin.plain_bank.filled, twin.mining, 60, True,
            torch.Generator().manual_seed(5),
        )  # fmt: skip
        assert 0 < int((label < 0).sum()) < 12
        assert int((claim <= 4).sum()) > 3
    else:
        rows, claim = out.extras["memory_index"], torch.full((len(out.extras["memory_index"]),), 5)
        banned = set(twin.pool.neighbour[batch["index"], :6].flatten().tolist()) | set(
            batch["index"].tolist()
        )
        assert set(rows.tolist()) == set(range(80)) - banned
    assert torch.equal(out.extras["group_label"], label)
    assert torch.equal(out.extras["memory_index"], rows)
    assert torch.equal(out.extras["memory_label"], claim)

    bank = twin.bank.embedding[rows].double()
    known = label > 0
    expected = slow_loss(z, label, z, label, 0.3) + 0.7 * slow_loss(z[known], label[known], bank, claim, 0.3)
    assert float(parts["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parts["loss"].backward()
    expected.backward()
    for one, two in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)
    assert not any(b.requires_grad for b in net.buffers())
    if stage == "impr":
        assert float(parts["memory_positives"]) == pytest.approx(int((claim <= 4).sum()) / 4)  # per anchor
    assert float(parts["kept_neighbours"]) == pytest.approx(float(known.view(4, 4)[:, 1:].float().mean()))


def test_with_low_thresholds_impr_trains_the_batch_as_base_does() -> None:
    losses = []
    for stage in ("base", "impr"):
        net, image = prepared(module(stage=stage, memory_size=0, mining={"in_batch": -1.0}))
        assert net.bank is None
        out = net.step(batch_of(net, image, [0, 9]))
        assert out.extras["group_label"].tolist() == [1] * 4 + [2] * 4
        losses.append(out.loss_fn(None)["loss"])
    assert torch.equal(*losses)


def test_the_plain_pass_moves_no_batch_norm_and_wakes_no_frozen_one() -> None:
    net, image = prepared(module())
    net.head = torch.nn.Sequential(torch.nn.BatchNorm1d(64), net.head)
    batch = batch_of(net, image, [0, 9])
    net.backbone.body[1].eval()
    frozen = net.backbone.body[1].running_mean.clone()
    net._plain_features(batch)
    assert not net.backbone.body[1].training
    assert net.backbone.body[4].training
    before = net.backbone.body[4].running_mean.clone()
    net._plain_features(batch)
    assert torch.equal(net.backbone.body[4].running_mean, before)
    assert int(net.head[0].num_batches_tracked) == 0
    net.step(batch)
    assert not torch.equal(net.backbone.body[4].running_mean, before)
    assert torch.equal(net.backbone.body[1].running_mean, frozen)


def test_evaluating_leaves_no_graph_and_draws_nothing() -> None:
    net, image = prepared(module())
    before = torch.get_rng_state()
    with evaluating(net):
        torch.rand(3)
        assert not net.embed(image).requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    assert net.embed(image).requires_grad


def test_memory_without_negatives_and_rows_that_a_bank_lacks() -> None:
    net, image = prepared(module(memory_negatives=False))
    batch = batch_of(net, image, [0, 9, 18])
    claim = net.step(batch).extras["memory_label"]
    assert len(claim) > 3
    assert int(claim.max()) <= 3
    net.memory_negatives, net.memory_size = True, len(claim) + 4
    assert len(net.step(batch).extras["memory_label"]) == len(claim) + 4
    net.memory_size = 60
    for bank in (net.bank, net.plain_bank):  # a feature that was not finite was not written
        assert bool((net.step(batch).extras["memory_index"] % 2 == 1).any())
        bank.epoch_seen[1::2] = -1
        rows = net.step(batch).extras["memory_index"]
        assert len(rows) > 0
        assert bool((rows % 2 == 0).all())
        bank.epoch_seen[1::2] = 0


def test_own_features_are_never_read_and_are_written_after_the_backward_pass() -> None:
    net, image = prepared(module(memory_write_start=9))  # which is of stage base
    batch = batch_of(net, image, [0, 9, 18])
    before = net.bank.embedding.clone()
    out = net.step(batch)
    assert not set(out.extras["memory_index"].tolist()) & set(batch["index"].tolist())
    net._select(out, batch)
    out.loss_fn(None)["loss"].backward()
    assert torch.equal(net.bank.embedding, before)
    net.on_after_backward()
    index, rows = batch["index"], F.normalize(out.embedding.detach(), dim=1)
    net.eval()
    plain = net.embed(batch["views"][1]).detach()
    for i in index.unique().tolist():
        last = int((index == i).nonzero()[-1])
        torch.testing.assert_close(net.bank.embedding[i], rows[last])
        torch.testing.assert_close(net.plain_bank.embedding[i], plain[last])
    others = [i for i in range(80) if i not in set(index.tolist())]
    assert torch.equal(net.bank.embedding[others], before[others])


def test_rows_that_a_filter_drops_enter_no_bank() -> None:
    net, image = prepared(module())
    batch = batch_of(net, image, [0, 9])
    index, rows = batch["index"], F.normalize(net.step(batch).embedding.detach(), dim=1)
    before = {name: getattr(net, name).embedding.clone() for name in ("bank", "plain_bank")}
    weight = (torch.arange(8) < 4).float()
    net.remember(FilterContext(rows, batch["label"], index), Selection(weight, weight, torch.tensor(0.5), {}))
    only = [i for i in index[4:].tolist() if i not in index[:4].tolist()]
    for name, old in before.items():
        new = getattr(net, name).embedding
        assert torch.equal(new[only], old[only])
        assert bool((new[index[:4]] != old[index[:4]]).any(dim=1).all())


def test_random_rows_of_the_memory_change_with_batch_and_seed(monkeypatch) -> None:
    net, image = prepared(module(stage="base", memory_size=20, exclude_nearest=3))
    batch, drawn = batch_of(net, image, [0, 9]), []
    for seed, number in ((7, 0), (7, 1), (8, 0), (7, 0)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        net.on_train_batch_start(batch, number)
        drawn.append((net.step(batch).extras["memory_index"].tolist(), float(torch.rand(()))))
    rows, dropout = zip(*drawn, strict=True)
    for what in (rows, dropout):
        assert what[0] == what[3]
        assert what[0] != what[1]
        assert what[0] != what[2]


def test_random_rows_of_the_memory_change_with_the_epoch(tmp_path: Path) -> None:
    """The first batches of two epochs draw from different numbers, whatever is in the batches."""
    seeds: dict[tuple[int, int], int] = {}

    class Seeds(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            seeds[trainer.current_epoch, batch_idx] = pl_module._draw_seed

    trainer(tmp_path, 2, [Seeds()], limit_train_batches=2, limit_val_batches=0).fit(module(), digits())
    assert len(set(seeds.values())) == 4


@pytest.mark.parametrize("stage", ["base", "impr"])
def test_an_image_that_stands_in_for_an_unreadable_neighbour_is_rejected(stage: str) -> None:
    net, image = prepared(module(stage=stage, mining={"in_batch": -1.0}))
    batch = batch_of(net, image, [0, 9])
    batch["index"][5:8] = batch["index"][5:8].flip(0)  # neighbours in any order are neighbours
    batch["index"][2], batch["index"][3] = int(net.pool.neighbour[0, 3]), 0  # the next one is none of the K
    assert net.step(batch).extras["group_label"].tolist() == [1, 1, -1, 1, 2, 2, 2, 2]


def test_a_nan_feature_of_a_plain_image_rejects_it() -> None:
    net, image = prepared(module())
    batch = batch_of(net, image, [0, 9])
    batch["views"][1] = batch["views"][1].clone()
    batch["views"][1][:2] = math.nan  # an anchor and a neighbour
    out = net.step(batch)
    assert out.extras["group_label"][:4].tolist() == [1, -1, -1, -1]
    loss = out.loss_fn(None)["loss"]
    loss.backward()
    assert loss.isfinite()
    net._select(out, batch)
    net.on_after_backward()
    assert net.plain_bank.embedding.isfinite().all()


def test_weights_of_a_filter_leave_rows_out() -> None:
    net, image = prepared(module(stage="base"))
    batch = batch_of(net, image, [0, 9])
    batch["index"][2] = next(i for i in range(80) if i not in {*net.pool.neighbour[0, :3].tolist(), 0})
    weight = torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1])
    out = net.step(batch)
    parts = out.loss_fn(weight)
    z, label = F.normalize(out.embedding.detach().double(), dim=1), out.extras["group_label"]
    on = weight > 0
    torch.testing.assert_close(
        parts["batch_loss"].detach().double(),
        slow_loss(z[on], label[on], z[on], label[on]),
        rtol=1e-5,
        atol=1e-6,
    )
    bank = net.bank.embedding[out.extras["memory_index"]].double()
    assert label.tolist() == [1, 1, -1, 1, 2, 2, 2, 2]
    on &= label > 0  # a rejected image does not meet the memory
    want = slow_loss(z[on], label[on], bank, out.extras["memory_label"])
    torch.testing.assert_close(parts["memory_loss"].detach().double(), want, rtol=1e-5, atol=1e-6)


def test_wrong_use_is_named() -> None:
    net, image = prepared(module())
    batch = batch_of(net, image, [0])
    with pytest.raises(ValueError, match="groups of 4 rows, but the batch has 3"):
        net.step({**batch, "index": batch["index"][:3]})
    del batch["views"]
    with pytest.raises(ValueError, match=r"holds 1: set data\.init_args\.train_view to InsCLRViews"):
        net.step(batch)
    with pytest.raises(ValueError, match="stage must be 'base' or 'impr', got 'v2'"):
        module(stage="v2")
    with pytest.raises(ValueError, match="pool_size is 2: it must be 3 or more"):
        module(pool_size=2)


def test_views_are_augmented_and_plain() -> None:
    image = torch.randint(0, 256, (3, 1, 12, 12), dtype=torch.uint8)
    one, plain = InsCLRViews(8, plain_size=12, crop_scale=(0.3, 0.5), flip=0.0)(image, ViewKey(0))
    assert one.shape == (3, 1, 8, 8)
    torch.testing.assert_close(plain, image / 255)


# ---- runs -----------------------------------------------------------------------------------------------


class _Watch(Callback):
    """Batches, pools and states of a run."""

    def __init__(self) -> None:
        self.index: list[Tensor] = []
        self.near: list[Tensor] = []
        self.read: list[Any] = []
        self.restored: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        self.restored = state_of(pl_module)  # callbacks come before the module

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.start = self.start or state_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.index.append(batch["index"])
        self.near.append(pl_module.pool.neighbour.clone())
        self.read.append(outputs["extras"]["memory_index"])


def _fit(
    folder: Path, epochs: int = 2, batches: int = 3, resume: Path | None = None, data=None, every=2, **kwargs
):
    saver = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_on_train_epoch_end=False
    )
    net, watch = module(**{"mining": DIGITS, **kwargs}), _Watch()
    run = trainer(folder, epochs, [saver, watch], limit_train_batches=batches, limit_val_batches=0)
    run.fit(net, data or digits(), ckpt_path=resume, weights_only=False if resume else None)
    return net, run, watch


def test_the_pool_is_the_exact_search_and_is_rebuilt_by_rule(tmp_path: Path) -> None:
    net, run, watch = _fit(tmp_path, 3, 2, pool_every_n_epochs=2)
    near = watch.near
    assert torch.equal(near[0], near[3])
    assert not torch.equal(near[3], near[4])
    assert int(net.pool.epoch) == 2
    for index, pool in zip(watch.index, near, strict=True):
        groups = index.view(-1, 4)
        assert torch.equal(groups[:, 1:], pool[groups[:, 0], :3].long())
    assert run.datamodule.train_neighbours is None
    torch.manual_seed(0)
    fresh = module()
    fresh.trainer = run
    z = embed_train_split(fresh)
    assert not watch.start["backbone.body.1.running_mean"].any()  # the pass moves nothing
    fresh.eval()
    with torch.no_grad():
        plain = [run.datamodule.apply_views(b, training=False) for b in run.datamodule.embed_dataloader()]
        torch.testing.assert_close(z, torch.cat([fresh.embed(b["image"]) for b in plain]))
    value, index = topk_search(z, z, 20, exclude=torch.arange(len(z)), backend="faiss")
    torch.testing.assert_close(watch.start["pool.similarity"], value)
    for bank in ("bank", "plain_bank"):  # filled by the same pass
        torch.testing.assert_close(watch.start[f"{bank}.embedding"], z)
    assert float((watch.start["pool.neighbour"] == index).float().mean()) > 0.99  # ties may swap


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("stage", ["base", "impr"])
def test_weights_of_another_type(tmp_path: Path, stage: str, precision: str) -> None:
    net = module(stage=stage, mining=DIGITS)
    run = trainer(tmp_path, 1, limit_train_batches=3, limit_val_batches=0, precision=precision)
    run.fit(net, digits())
    assert net.bank.embedding.dtype is torch.float32
    assert float(run.callback_metrics["train/memory_loss"]) > 0
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_pass_over_the_train_split_runs_in_the_precision_of_training(
    tmp_path: Path, monkeypatch, precision: str
) -> None:
    seen: list[bool] = []
    project = InsCLR._project

    def watched(self: InsCLR, x: Tensor) -> Tensor:
        if not self.training:
            seen.append(torch.is_autocast_enabled("cpu"))
        return project(self, x)

    monkeypatch.setattr(InsCLR, "_project", watched)
    run = trainer(tmp_path, 1, limit_train_batches=1, limit_val_batches=0, precision=precision)
    run.fit(module(), digits())
    assert set(seen) == {precision == "bf16-mixed"}


def test_memory_format_and_what_ddp_leaves_alone(tmp_path: Path) -> None:
    net, _, _ = _fit(tmp_path, 1, 1, channels_last=True)
    assert net.backbone.body[3].weight.is_contiguous(memory_format=torch.channels_last)
    ignored = net._ddp_params_and_buffers_to_ignore
    assert {"pool.neighbour", "bank.embedding", "plain_bank.embedding"} <= set(ignored)


def test_features_go_to_their_dataset_positions_and_unread_images_hold_nan() -> None:
    net = module()
    image = torch.rand(5, 1, 8, 8)
    batches = [{"image": image[i], "index": i} for i in (torch.tensor([3, 0]), torch.tensor([2]))]
    data = SimpleNamespace(
        num_train_samples=5, embed_dataloader=lambda: batches, apply_views=lambda batch, training: batch
    )
    net.trainer = SimpleNamespace(
        datamodule=data, precision_plugin=SimpleNamespace(forward_context=nullcontext)
    )
    z = embed_train_split(net)
    want = net.eval().embed(image).detach()
    want[[1, 4]] = math.nan
    torch.testing.assert_close(z, want, equal_nan=True)


def test_base_memory_is_written_and_read_from_its_steps_on(tmp_path: Path) -> None:
    net, _, watch = _fit(
        tmp_path, 1, 5, stage="base", memory_write_start=1, memory_start=3, memory_size=500, exclude_nearest=3
    )
    assert [r is None for r in watch.read] == [True, True, True, False, False]
    written = set(torch.cat(watch.index[1:]).tolist())
    assert set(net.bank.filled.nonzero().flatten().tolist()) == written
    assert set(watch.read[3].tolist()) <= set(torch.cat(watch.index[1:3]).tolist())
    assert net.plain_bank is None


@pytest.mark.parametrize("step", [2, 4])
def test_resume_is_bit_equal_with_pool_and_memory(tmp_path: Path, step: int) -> None:
    """In mid-epoch, and at the end of the epoch after which the pool is rebuilt."""
    options = {"pool_every_n_epochs": 1, "memory_negatives": True}
    whole, run, _ = _fit(tmp_path / "whole", 2, 4, **options)
    saved = tmp_path / "whole" / f"step={step}.ckpt"
    keys = torch.load(saved, weights_only=False)["state_dict"]
    assert {
        "pool.neighbour",
        "pool.similarity",
        "pool.epoch",
        "bank.embedding",
        "plain_bank.epoch_seen",
    } <= set(keys)
    resumed, rerun, watch = _fit(tmp_path / "again", 2, 4, saved, **options)
    assert_same_state(watch.restored, keys)
    assert rerun.global_step == run.global_step == 8
    assert_same_state(state_of(whole), state_of(resumed))


def test_checkpoints_serve_elsewhere(tmp_path: Path) -> None:
    """For evaluation, and as start weights of another method or of another data set; memories stay behind."""
    net, _, _ = _fit(tmp_path, 1, 2)
    saved = tmp_path / "step=2.ckpt"
    loaded = InsCLR.load_from_checkpoint(saved, weights_only=False)
    assert loaded.pool is None
    assert loaded.mining == net.mining
    assert torch.equal(loaded.head.weight, net.head.weight)
    small, _, watch = _fit(tmp_path / "next", 1, 1, data=digits(test_size=1497), init_weights=str(saved))
    assert small.pool.num_samples == 300
    assert torch.equal(watch.start["head.weight"], net.head.weight)
    assert int(watch.start["bank.epoch_seen"].min()) == 0  # filled by a pass of its own
    start, other = _Watch(), MetricLearning(
        "conv4", {"input_size": 8, "widths": [8, 16], "strides": [2, 2]}, 1, embedding_dim=12,
        init_weights=str(saved),
    )  # fmt: skip
    start.on_train_batch_end = lambda *_: None  # type: ignore[method-assign]
    trainer(tmp_path / "other", 1, [start], limit_train_batches=1, limit_val_batches=0).fit(other, digits())
    assert torch.equal(start.start["head.weight"], net.head.weight)


def test_a_resumed_run_does_not_read_its_start_weights_again(tmp_path: Path) -> None:
    first, _, _ = _fit(tmp_path, 1, 2)
    begin = str(tmp_path / "step=2.ckpt")
    _fit(tmp_path / "tuned", 1, 2, init_weights=begin)
    saved = tmp_path / "tuned" / "step=2.ckpt"
    keys = torch.load(saved, weights_only=False)["state_dict"]
    assert not torch.equal(keys["head.weight"], first.head.weight)
    _, _, watch = _fit(tmp_path / "more", 2, 2, saved, init_weights=begin)
    assert_same_state(watch.restored, keys)


def test_the_pool_of_every_epoch_is_its_own(tmp_path: Path) -> None:
    net, _, watch = _fit(tmp_path, 2, 1, pool_every_n_epochs=1)
    assert int(net.pool.epoch) == 1
    assert not torch.equal(*watch.near)


class _OneImage(torch.nn.Module):
    """Gives every image the same feature, or none at all."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x), 64) + 0 * x.mean()


def test_training_survives_an_empty_pool_a_lone_image_and_equal_features(tmp_path: Path) -> None:
    net = module(memory_size=20)
    data = digits(batch_size=4)
    data.splits.train = data.splits.train.subset(torch.tensor([7]).numpy())
    data._train_keep = torch.ones(1, dtype=torch.bool)
    trainer(tmp_path, 2, limit_val_batches=0).fit(net, data)
    assert net.pool.neighbour.max() == -1
    assert all(p.isfinite().all() for p in net.parameters())
    net, same = module(memory_size=20), _Watch()
    net.backbone = _OneImage(1.0)
    trainer(tmp_path, 1, [same], limit_val_batches=0, limit_train_batches=2).fit(net, digits())
    assert all(p.isfinite().all() for p in net.parameters())


def test_images_without_a_finite_feature_are_nobodys_neighbours(tmp_path: Path, monkeypatch) -> None:
    bad = torch.tensor([3, 50, 51])

    def features(net):
        z = embed_train_split(net)
        z[bad] = math.nan
        return z

    monkeypatch.setattr("lightning_nrml.modules.insclr.embed_train_split", features)
    with pytest.warns(UserWarning, match="3 of 500 training images have no finite feature"):
        net, _, watch = _fit(tmp_path, 1, 2)
    assert not torch.isin(watch.start["pool.neighbour"], bad.int()).any()
    assert (watch.start["pool.neighbour"][bad] == -1).all()
    assert (watch.start["bank.epoch_seen"][bad] == -1).all()
    assert all(p.isfinite().all() for p in net.parameters())


def test_data_with_batches_of_their_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="with m_per_class left at null"):
        trainer(tmp_path, 1).fit(module(), digits(m_per_class=4))
