"""Online evaluation on two processes equals one process on all rows."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import digits, module

from lightning_nrml import distributed
from lightning_nrml.callbacks import OnlineKNN, OnlineLinearProbe, RepresentationHealth
from lightning_nrml.callbacks.probe import ProbeHead
from lightning_nrml.metrics import TopKAccuracy


def fake_trainer(data: Any) -> Any:
    """The parts of a trainer that the callbacks use, in a process group that exists already."""

    def to_device(batch: Any, dataloader_idx: int = 0) -> Any:
        return data.apply_views(batch, training=False)

    return SimpleNamespace(
        datamodule=data,
        strategy=SimpleNamespace(batch_to_device=to_device),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        state=SimpleNamespace(fn="validate"),
        sanity_checking=False,
        current_epoch=3,
    )


def evaluate(mode: str) -> dict[str, float]:
    """Every callback over this rank's part of the data; what each would log."""
    data, net = digits(eval_batch_size=100), module()
    run, logged = fake_trainer(data), {}
    net.log = lambda key, value, **_: logged.update({key: float(value)})
    callbacks = [OnlineKNN(k=5, mode=mode), RepresentationHealth(max_samples=401), OnlineLinearProbe()]
    for callback in (callbacks[0], callbacks[2]):
        callback.setup(run, net, "fit")
    callbacks[2].on_fit_start(run, net)
    train = [run.strategy.batch_to_device(b) for b in data.embed_dataloader()]
    train = {key: torch.cat([b[key] for b in train]) for key in ("image", "label", "index")}
    # ranks train on equal numbers of rows: the first one leaves out its last, and so does one process
    count = len(train["label"])
    size = min(distributed.gather_sizes(count, torch.device("cpu")))
    rows = torch.arange(count)
    rows = rows[:size] if distributed.world_size() == 2 else rows[rows != count // 2]
    train = {key: value[rows] for key, value in train.items()}
    train["views"] = [train["image"], train["image"].roll(1, 3)]
    with torch.no_grad():
        outputs = {"embedding": net.train().head(net.backbone.eval()(train["image"]))}
    for callback in callbacks:
        callback.on_train_batch_end(run, net, outputs, train, 0)
    for callback in callbacks:
        callback.on_validation_epoch_start(run, net)
    for batch in data.val_dataloader():
        batch = run.strategy.batch_to_device(batch)
        with torch.no_grad():
            out = {"embedding": net.eval().embed(batch["image"])}
        for callback in callbacks:
            callback.on_validation_batch_end(run, net, out, batch, 0)
    for callback in callbacks:
        callback.on_validation_epoch_end(run, net)
    return logged


@pytest.mark.parametrize("mode", ["exact", "running"])
def test_both_ranks_log_the_same_and_kNN_and_probe_are_those_of_one_process(gloo_pool, mode) -> None:
    ranks, alone = gloo_pool.run(evaluate, mode), evaluate(mode)
    assert ranks[0] == ranks[1]
    assert ranks[0].keys() == alone.keys() >= {"val/knn_top1", "val/probe_top1", "health/alignment"}
    for key, value in alone.items():
        if key.startswith("val/knn"):
            assert ranks[0][key] == value, key
        else:  # another 401 of 500 images: close, not equal
            assert ranks[0][key] == pytest.approx(value, rel=0.05, abs=0.03), key


def ragged_step() -> tuple[torch.Tensor, torch.Tensor, float]:
    g = torch.Generator().manual_seed(0)
    z, label = torch.randn(11, 6, generator=g), torch.randint(-1, 4, (11,), generator=g)
    parts = [slice(0, 3), slice(3, 11)] if distributed.world_size() == 2 else [slice(0, 11)]
    rows = parts[dist.get_rank() if distributed.world_size() == 2 else 0]
    head = ProbeHead(6, 4)
    head.weight.data = torch.randn(4, 6, generator=g)
    loss = head.gradient(z[rows], label[rows])
    return head.weight.grad, head.bias.grad, float(loss)


def test_gradient_of_the_probe_is_that_of_the_global_batch(gloo_pool) -> None:
    want = ragged_step()
    for weight, bias, loss in gloo_pool.run(ragged_step):
        assert torch.allclose(weight, want[0], atol=1e-6)
        assert torch.allclose(bias, want[1], atol=1e-6)
        assert loss == pytest.approx(want[2])


def one_rank_has_rows() -> dict[str, float]:
    metric = TopKAccuracy((1, 2))
    if dist.get_rank() == 1:
        metric.update(torch.eye(3), torch.tensor([0, 1, 0]))
    return metric.compute()


def test_accuracy_where_one_rank_has_no_rows(gloo_pool) -> None:
    # row 2 scores class 2 first and then, by the tie rule, class 0
    assert gloo_pool.run(one_rank_has_rows) == [pytest.approx({"top1": 2 / 3, "top2": 1.0})] * 2
