"""Self-supervised modules: steps against their formulas, teacher, queue, prototypes, and that they learn."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers import state_of, trainer
from lightning.pytorch.callbacks import Callback
from ssl_runs import METHODS, PooledNet, digits, module
from torch.nn import functional as F

from lightning_nrml.callbacks import KnownClean
from lightning_nrml.data import NoiseConfig
from lightning_nrml.losses.swav import sinkhorn
from lightning_nrml.models import cosine_tau
from lightning_nrml.modules import SimCLR


def _batch(rows: int = 12, sizes: tuple[int, ...] = (8, 8), start: int = 0) -> dict:
    torch.manual_seed(start)
    views = [torch.rand(rows, 1, s, s) for s in sizes]
    return {
        "image": views[0],
        "views": views,
        "label": torch.zeros(rows, dtype=torch.int64),
        "index": torch.arange(start, start + rows),
    }


class _Record(Callback):
    """The state before training and after every batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.states.append(state_of(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.states.append(state_of(pl_module))


def _fit(folder: Path, method: str, batches: int = 4, epochs: int = 1, callbacks=(), data=None, **kwargs):
    options = {k: kwargs.pop(k) for k in ("accumulate_grad_batches", "precision") if k in kwargs}
    net, record = module(method, **kwargs), _Record()
    run = trainer(
        folder, epochs, [record, *callbacks], limit_train_batches=batches, limit_val_batches=0, **options
    )
    run.fit(net, digits(method) if data is None else data)
    return net, record.states


def _unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.double(), dim=1)


# ---- steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [True, False])
def test_simclr_step_is_the_papers_loss_with_the_chosen_batch_statistics(joint: bool) -> None:
    net, batch = module("SimCLR", joint_views=joint, temperature=0.3), _batch(6)
    out = net.step(batch)
    loss = out.loss_fn(None)
    views = batch["views"]
    if joint:
        z = net.projector(net.backbone(torch.cat(views)))
    else:
        z = torch.cat([net.projector(net.backbone(v)) for v in views])
    z, total = _unit(z.detach()), 0.0
    for i in range(12):
        mass = sum(math.exp(float(z[i] @ z[a]) / 0.3) for a in range(12) if a != i)
        total += math.log(mass) - float(z[i] @ z[(i + 6) % 12]) / 0.3
    assert float(loss.detach()) == pytest.approx(total / 12, rel=1e-5)
    assert out.embedding.shape == (6, net.embedding_dim)


@pytest.mark.parametrize("joint", [False, True])
def test_byol_step_and_its_gradients(joint: bool) -> None:
    net, batch = module("BYOL", joint_views=joint), _batch()
    for p in net.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    loss = net.step(batch).loss_fn(None)["loss"]
    views = [torch.cat(batch["views"])] if joint else batch["views"]
    p = _unit(torch.cat([net.predictor(net.projector(net.backbone(v))) for v in views])).chunk(2)
    t = _unit(torch.cat([net.teacher(v) for v in views])).chunk(2)
    expected = (4 - 2 * (p[0] * t[1]).sum(1) - 2 * (p[1] * t[0]).sum(1)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in net.teacher.parameters())
    for part in (net.backbone, net.projector, net.predictor):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters() if p.ndim > 1)


def test_moco_step_contrasts_with_the_queue_as_it_was() -> None:
    net, batch = module("MoCo", temperature=0.2), _batch()
    before = net.queue.embedding.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(100))
    q = _unit(net.projector(net.backbone(batch["views"][0])))
    k = _unit(net.teacher(batch["views"][1]))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ before.double().T], dim=1) / 0.2
    expected = (logits.logsumexp(1) - logits[:, 0]).mean()
    loss = net.step(batch).loss_fn(None)
    assert torch.equal(net.queue.embedding, before)
    loss.backward()
    net.on_after_backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(net.queue.embedding[:12].double(), k, rtol=0, atol=1e-6)
    assert torch.equal(net.queue.index[:12], batch["index"])
    assert torch.equal(net.queue.embedding[12:], before[12:])


def test_queue_holds_the_newest_keys_in_order() -> None:
    net, keys = module("MoCo", queue_size=20), []
    for step in range(3):
        net.step(_batch(start=12 * step)).loss_fn(None).backward()
        keys.append(net._new_keys[0].clone())
        net.on_after_backward()
    expected = torch.cat(keys)[-20:]
    assert int(net.queue.pointer) == 36 % 20
    assert torch.equal(net.queue.embedding.roll(-16, 0), expected)
    assert net.queue.index.roll(-16, 0).tolist() == list(range(16, 36))


def test_queries_have_batch_statistics_of_their_own_split() -> None:
    net, batch = module("MoCo", bn_splits=3), _batch()
    view = batch["views"][0]
    want = torch.cat([net.backbone(part) for part in view.chunk(3)])
    torch.testing.assert_close(net.step(batch).embedding, want)
    assert not torch.allclose(net.backbone(view), want)


def test_keys_come_back_in_order_and_are_shuffled_over_the_splits() -> None:
    net, view = module("MoCo", bn_splits=3), _batch()["views"][1]
    plain = torch.cat([net.teacher(v) for v in view.chunk(3)])
    assert (net.keys(view) - F.normalize(plain, dim=1)).abs().max() > 1e-3
    net.teacher.eval()
    torch.testing.assert_close(net.keys(view), F.normalize(net.teacher(view), dim=1))
    net.train()
    net.shuffle_bn = False
    torch.testing.assert_close(net.keys(view), F.normalize(plain, dim=1))
    with pytest.raises(ValueError, match="does not divide the batch of 11"):
        net.keys(view[:11])


def test_keys_are_shuffled_anew_in_every_batch() -> None:
    net, batch = module("MoCo", bn_splits=3), _batch()
    keys = []
    for number in (0, 1, 0):
        net.on_train_batch_start(batch, number)
        keys.append(net.keys(batch["views"][1]))
    torch.testing.assert_close(keys[2], keys[0])
    assert (keys[1] - keys[0]).abs().max() > 1e-3  # other images share their batch statistics


def test_mochi_is_moco_until_the_warm_up_is_over(tmp_path: Path) -> None:
    plain, mixed, batch = module("MoCo"), module("MoCHi", warmup_epochs=1), _batch()
    later = module("MoCHi", warmup_epochs=0)
    loss = plain.step(batch).loss_fn(None)
    assert torch.equal(mixed.step(batch).loss_fn(None), loss)
    assert float(later.step(batch).loss_fn(None).detach()) > float(loss.detach())
    mixed = module("MoCHi", num_hard=21, num_mixed=8, num_query_mixed=4).mixed_loss
    assert (mixed.num_hard, mixed.num_mixed, mixed.num_query_mixed) == (21, 8, 4)
    cold = {"temperature": 0.5, "num_hard": 100}  # the whole queue may be hard
    plain, unmixed = module("MoCo", temperature=0.5), module("MoCHi", warmup_epochs=0, num_mixed=0, **cold)
    unmixed.mixed_loss.num_query_mixed = 0
    assert torch.equal(unmixed.step(batch).loss_fn(None), plain.step(batch).loss_fn(None))
    with pytest.raises(ValueError, match="num_hard is 101, more than the 100 keys"):
        module("MoCHi", num_hard=101)


def test_swav_groups_crops_by_size_and_codes_with_the_queue() -> None:
    net = module("SwAV", queue_start_epoch=0)
    net.backbone = PooledNet(64)
    net.backbone.eval()
    batch, calls = _batch(6, (8, 8, 6, 6, 6)), []
    net.backbone.register_forward_hook(lambda _, x, __: calls.append(tuple(x[0].shape)))
    assert net.step(batch).loss_fn(None).requires_grad
    assert calls == [(12, 1, 8, 8), (18, 1, 6, 6)]
    assert [len(r) for r in net._new_rows] == [6, 6]
    net.on_after_backward()
    scores = torch.randn(6, 20)
    torch.testing.assert_close(net.codes(scores, 1), sinkhorn(scores))  # 6 of 64 rows: not yet in use
    rows = F.normalize(torch.randn(64, 16), dim=1)
    net.queues[1].enqueue(rows)
    with torch.no_grad():
        every = sinkhorn(torch.cat([net.queues[1].embedding @ net.prototypes.weight.T, scores]))
    torch.testing.assert_close(net.codes(scores, 1), every[64:])
    torch.testing.assert_close(net.codes(scores, 0), sinkhorn(scores))


def test_swav_step_is_the_papers_loss_with_its_settings() -> None:
    """Two large and two small crops, a full queue for each large one; codes by the card's loop."""
    options = {"temperature": 0.3, "epsilon": 0.2, "sinkhorn_iterations": 7, "queue_start_epoch": 0}
    net, batch = module("SwAV", **options), _batch(6, (8, 8, 6, 6))
    net.backbone = PooledNet(64)
    net.eval()
    torch.manual_seed(1)
    net.projector[-1].bias.data.normal_()  # so that the crops' projections differ in length, too
    for queue in net.queues:
        queue.enqueue(F.normalize(torch.randn(64, 16), dim=1))
    c = net.prototypes.weight.detach().double()
    z = [_unit(net.projector(net.backbone(v)).detach()) for v in batch["views"]]
    codes = []
    for own, queue in zip(z[:2], net.queues, strict=True):
        q = (torch.cat([queue.embedding.double(), own]) @ c.T / 0.2).exp().T
        for _ in range(7):
            q = q / q.sum(dim=1, keepdim=True)
            q = q / q.sum(dim=0, keepdim=True)
        codes.append(q.T[64:])
    total = 0.0
    for i, q in enumerate(codes):
        for v in range(4):
            if v != i:
                total -= float((q * (z[v] @ c.T / 0.3).log_softmax(dim=1)).sum(dim=1).mean()) / 3 / 2
    assert float(net.step(batch).loss_fn(None)) == pytest.approx(total, rel=1e-5)
    net.on_after_backward()
    for own, queue in zip(z[:2], net.queues, strict=True):
        torch.testing.assert_close(queue.embedding[:6].double(), own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_filters_and_callbacks_see_the_features_of_the_first_view(method: str) -> None:
    net, batch = module(method).eval(), _batch()
    torch.testing.assert_close(net.step(batch).embedding, net.backbone(batch["views"][0]))


@pytest.mark.parametrize("method", METHODS)
def test_every_batch_has_random_numbers_of_its_own(method: str, monkeypatch) -> None:
    """So that dropout is the same after a resume at any point."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    net, drawn = module(method), []
    for number in (3, 4, 3):
        net.on_train_batch_start(_batch(), number)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_views_and_teacher_have_the_memory_format_of_the_backbone(channels_last: bool) -> None:
    net, batch = module("BYOL", in_channels=3, channels_last=channels_last), _batch()
    views = [view.expand(-1, 3, -1, -1).contiguous() for view in batch["views"]]
    net.setup("fit")
    teacher = net.teacher.module[0].body[0].weight
    for x in (*net._formatted({**batch, "image": views[0], "views": views})["views"], teacher):
        assert x.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_one_view_is_refused() -> None:
    batch = _batch()
    del batch["views"]
    with pytest.raises(ValueError, match="BYOL needs 2 views of each image, but the batch holds 1: set data"):
        module("BYOL").step(batch)


def test_a_vision_transformer_learns_too() -> None:
    net = SimCLR("test_vit", {"img_size": 32}, in_channels=1, projector_dim=8)
    net.step(_batch(4, (32, 32))).loss_fn(None).backward()
    assert sum(float(p.grad.abs().sum()) for p in net.backbone.parameters()) > 0


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("SwAV", {"num_prototypes": 0}, "num_prototypes must be at least 2, got 0"),
        ("SwAV", {"num_prototypes": -3}, "num_prototypes must be at least 2, got -3"),
        ("SwAV", {"num_prototypes": 1}, "num_prototypes must be at least 2, got 1"),
        ("SwAV", {"sinkhorn_iterations": 0}, "sinkhorn_iterations must be at least 1, got 0"),
        ("SwAV", {"queue_size": -1}, "queue_size must be at least 0, got -1"),
        ("SwAV", {"large_crops": 0}, "large_crops must be at least 1, got 0"),
        ("SwAV", {"epsilon": 0.0}, r"epsilon must be positive, got 0\.0"),
        ("SimCLR", {"projector_dim": 0}, r"projector_dim\) must be at least 1, got 0"),
        ("MoCo", {"projector_dim": -2}, r"projector_dim\) must be at least 1, got -2"),
        ("BYOL", {"projector_hidden": 0}, r"projector_hidden\) must be at least 1, got 0"),
    ],
)
def test_sizes_are_checked_before_the_run(method: str, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        module(method, **options)


@pytest.mark.parametrize(("large", "sizes"), [(3, (8, 8, 4, 4)), (2, (8, 4, 8)), (1, (4, 8)), (2, (4, 4, 8))])
def test_swav_refuses_to_code_a_small_crop(large: int, sizes: tuple[int, ...]) -> None:
    net = module("SwAV", large_crops=large)
    net.backbone = PooledNet(64)
    with pytest.raises(ValueError, match=f"large_crops is {large}, .* {sizes[-1]} x {sizes[-1]} pixels: set"):
        net.step(_batch(6, sizes))


VIT = {"img_size": 32, "patch_size": 8, "depth": 1}


@pytest.mark.parametrize("method", ["SimCLR", "BYOL", "SwAV"])
def test_a_backbone_of_one_size_says_so(method: str) -> None:
    net = module(method, backbone="vit_tiny_patch16_224", backbone_kwargs=VIT)
    with pytest.raises(ValueError, match=r"16 x 16 pixels .*model \(32\).*dynamic_img_size: true"):
        net.step(_batch(4, (16, 16) if method != "SwAV" else (32, 32, 16)))


# ---- runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["BYOL", "MoCo"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_teacher_moves_once_per_optimiser_step_after_the_step(
    tmp_path: Path, method: str, accumulate: int
) -> None:
    net, states = _fit(tmp_path, method, 4, accumulate_grad_batches=accumulate)
    key, twin = "teacher.module.0.body.0.weight", "backbone.body.0.weight"
    teacher, total = states[0][key].double(), 4 // accumulate
    assert torch.equal(states[0][key], states[0][twin])
    for batch in range(1, 5):
        if batch % accumulate == 0:
            step = batch // accumulate - 1
            tau = cosine_tau(step, total, 0.9) if method == "BYOL" else 0.9
            teacher = tau * teacher + (1 - tau) * states[batch][twin].double()
        torch.testing.assert_close(states[batch][key].double(), teacher, rtol=0, atol=3e-7)
    assert not torch.equal(states[4][key], states[0][key])
    if method == "BYOL":  # logs the momentum of the step that the batch belongs to
        assert float(net.trainer.callback_metrics["train/tau"]) == pytest.approx(tau, abs=1e-6)


@pytest.mark.parametrize("method", ["BYOL", "MoCo"])
def test_teacher_moves_under_bf16_true(tmp_path: Path, method: str) -> None:
    net, states = _fit(tmp_path, method, 4, precision="bf16-true", tau=0.999, tau_schedule="constant")
    key, twin = "teacher.module.0.body.0.weight", "backbone.body.0.weight"
    assert states[0][twin].dtype is torch.bfloat16
    teacher = states[0][key].double()
    for state in states[1:]:
        teacher = 0.999 * teacher + 0.001 * state[twin].double()
        torch.testing.assert_close(state[key].double(), teacher, rtol=0, atol=3e-7)
    assert not torch.equal(states[4][key], states[0][key])
    assert not any(p.requires_grad for p in net.teacher.parameters())


def test_prototypes_are_frozen_then_learn_and_start_each_step_with_length_one(tmp_path: Path) -> None:
    _, states = _fit(tmp_path, "SwAV", 3, epochs=2, freeze_epochs=1)
    weight = [s["prototypes.weight"] for s in states]
    for w in weight[:4]:
        torch.testing.assert_close(w, weight[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(w.norm(dim=1), torch.ones(20))
    assert (weight[4] - weight[3]).abs().max() > 1e-4
    assert [int(s["queues.0.count"]) for s in states] == [0, 0, 0, 0, 64, 64, 64]


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_weight_zero_count_in_no_loss(method: str) -> None:
    batch = _batch(sizes=(8, 8, 8) if method == "SwAV" else (8, 8))
    losses = []
    for weight in (None, torch.ones(12), (torch.arange(12) < 5).float(), torch.zeros(12)):
        torch.manual_seed(1)
        found = module(method).step(batch).loss_fn(weight)
        losses.append(float((found["loss"] if isinstance(found, dict) else found).detach()))
    every, ones, some, none = losses
    assert every == pytest.approx(ones, rel=1e-6)
    assert some != pytest.approx(every, rel=1e-3)
    assert none == 0


@pytest.mark.parametrize("method", ["MoCo", "SwAV"])
def test_starting_over_makes_the_queues_anew(method: str) -> None:
    net, fresh = module(method), module(method)
    queues = [net.queue] if method == "MoCo" else list(net.queues)
    for queue in queues:
        queue.enqueue(torch.ones(7, 16))
    net.start_over()
    for name, value in fresh.state_dict().items():
        if name.startswith("queue"):
            assert torch.equal(net.state_dict()[name], value), name


def test_prototypes_have_length_one_before_every_forward_pass() -> None:
    net = module("SwAV")
    want = net.prototypes.weight.detach().clone()
    net.prototypes.weight.data *= 3
    net.on_train_batch_start(_batch(), 0)
    torch.testing.assert_close(net.prototypes.weight.detach(), want)


def test_each_large_crop_has_a_queue_of_its_own() -> None:
    net, batch = module("SwAV", queue_start_epoch=0), _batch()
    want = F.normalize(net.projector(net.backbone(torch.cat(batch["views"]))), dim=1).detach().chunk(2)
    net.step(batch).loss_fn(None).backward()
    assert [len(queue) for queue in net.queues] == [0, 0]
    net.on_after_backward()
    for queue, rows in zip(net.queues, want, strict=True):
        torch.testing.assert_close(queue.get()[0], rows)


def test_rows_that_a_filter_drops_never_enter_the_queue(tmp_path: Path) -> None:
    data = digits("MoCo", noise=NoiseConfig("symmetric", 0.5, 1))
    net, _ = _fit(tmp_path, "MoCo", 3, callbacks=[KnownClean()], data=data)
    index = net.queue.index[net.queue.index >= 0]
    assert 60 < len(index) < 130  # of 192 drawn
    assert not bool(data.train_is_noise[index].any())


def test_rows_that_a_filter_drops_never_enter_the_queues_of_swav(tmp_path: Path) -> None:
    data = digits("SwAV", noise=NoiseConfig("symmetric", 0.5, 1))
    options = {"queue_start_epoch": 0, "queue_size": 192}
    net, _ = _fit(tmp_path, "SwAV", 3, callbacks=[KnownClean()], data=data, **options)
    kept = int(net.queues[0].count)
    assert 60 < kept < 130  # of 192 drawn
    assert int(net.queues[1].count) == kept


@pytest.mark.parametrize(
    ("method", "argument", "what"),
    [("MoCHi", "warmup_epochs", "mixes no negatives"), ("SwAV", "queue_start_epoch", "fills no queue")],
)
def test_a_run_shorter_than_its_warm_up_says_so(
    tmp_path: Path, method: str, argument: str, what: str
) -> None:
    def told(first: int, epochs: int, **options) -> list[str]:
        net = module(method, **{argument: first})
        run = trainer(tmp_path, epochs, limit_train_batches=3, limit_val_batches=0, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(net, digits(method))
        return [str(w.message) for w in caught if what in str(w.message)]

    (message,) = told(2, 2)
    assert f"{argument} is 2 and the run has 2 epochs" in message
    assert not told(1, 2)
    assert len(told(2, -1, max_steps=4, accumulate_grad_batches=2)) == 1  # two steps an epoch
    assert not told(2, -1, max_steps=5, accumulate_grad_batches=2)


def test_one_image_is_no_batch_to_contrast(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the batch holds 1 image: set data\.init_args.batch_size to 2 or more"
    ):
        _fit(tmp_path, "SimCLR", 2, data=digits("SimCLR", batch_size=1))
    net = SimCLR("test_vit", {"img_size": 32}, in_channels=1, projector_dim=8)
    net.on_train_batch_start(_batch(2), 0)


def test_batch_norm_of_one_image_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch norms of BYOL need .* holds 1: raise data"):
        _fit(tmp_path, "BYOL", 2, data=digits("BYOL", batch_size=1))
    backbone = {"backbone_kwargs": {"input_size": 8, "widths": [8], "strides": [8]}}
    with pytest.raises(ValueError, match=r"holds 4: raise .*batch_size, or lower model.init_args.bn_splits"):
        _fit(tmp_path, "MoCo", 2, data=digits("MoCo", batch_size=4), bn_splits=4, **backbone)


def test_collapse_would_show_in_output_std() -> None:
    from lightning_nrml.modules.byol import spread

    torch.manual_seed(0)
    assert float(spread(torch.randn(1000, 64))) == pytest.approx(1.0, abs=0.02)
    assert float(spread(torch.randn(1, 64).expand(50, 64))) == pytest.approx(0.0, abs=1e-6)
