"""Self-supervised modules on two ranks: keys, queue and codes are those of one process."""

from __future__ import annotations

import pytest
import torch
from ssl_runs import module
from torch.nn import functional as F

from lightning_nrml import distributed

ROWS = 6


def _views() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2 * ROWS, 1, 8, 8, generator=generator) for _ in range(2)]


def moco_step(splits: int) -> list[torch.Tensor]:
    """Loss, queue and gradient of one step on this rank's rows; one process splits its batch statistics."""
    net = module("MoCo", bn_splits=splits)
    net._order_seed = 5
    mine = distributed.own_rows([2 * ROWS // distributed.world_size()] * distributed.world_size())
    views = [v[mine] for v in _views()]
    batch = {"image": views[0], "views": views, "label": torch.zeros(len(views[0])).long()}
    loss = net.step({**batch, "index": torch.arange(2 * ROWS)[mine]}).loss_fn(None)
    loss.backward()
    net.on_after_backward()
    grad = net.projector[0].weight.grad
    return [distributed.mean_over_ranks(x) for x in (loss, grad)] + [net.queue.embedding, net.queue.index]


def test_moco_with_shuffled_batch_norm_equals_one_process_with_two_splits(gloo_pool) -> None:
    one = moco_step(2)
    for two in gloo_pool.run(moco_step, 1):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    assert one[3][: 2 * ROWS].tolist() == list(range(2 * ROWS))


def swav_codes(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of this rank's rows with a full queue, gathered, and the queue after new rows."""
    net = module("SwAV", queue_start_epoch=0, queue_size=size)
    generator = torch.Generator().manual_seed(1)
    net.queues[0].enqueue(F.normalize(torch.randn(size, 16, generator=generator), dim=1))
    scores = torch.randn(2 * ROWS, 20, generator=generator) * 0.3
    z = F.normalize(torch.randn(2 * ROWS, 16, generator=generator), dim=1)
    mine = distributed.own_rows([2 * ROWS // distributed.world_size()] * distributed.world_size())
    codes = net.codes(scores[mine], 0)
    net._new_rows = [z[mine], z[mine]]
    net.on_after_backward()
    return distributed.gather(codes), net.queues[0].embedding


@pytest.mark.parametrize("size", [64, 7, 1])  # odd ones cannot be shared evenly
def test_swav_codes_with_a_shared_queue_equal_one_process(gloo_pool, size: int) -> None:
    codes, queue = swav_codes(size)
    for other_codes, other_queue in gloo_pool.run(swav_codes, size):
        torch.testing.assert_close(other_codes, codes, rtol=1e-4, atol=1e-6)
        assert torch.equal(other_queue, queue)


def one_step(method: str) -> list[torch.Tensor]:
    """Loss and mean gradients of one step; batch norm uses stored statistics, which no split changes."""
    net = module(method, **({"queue_start_epoch": 0} if method == "SwAV" else {})).eval()
    generator = torch.Generator().manual_seed(3)
    if method == "SwAV":
        for queue in net.queues:
            queue.enqueue(F.normalize(torch.randn(64, 16, generator=generator), dim=1))
    mine = distributed.own_rows([2 * ROWS // distributed.world_size()] * distributed.world_size())
    views = [v[mine] for v in _views()]
    batch = {"image": views[0], "views": views, "label": torch.zeros(len(views[0])).long()}
    loss = net.step({**batch, "index": torch.arange(2 * ROWS)[mine]}).loss_fn(None)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    loss.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return [distributed.mean_over_ranks(x.detach()) for x in (loss, *grads)]


@pytest.mark.parametrize("method", ["SimCLR", "MoCo", "BYOL", "SwAV"])
def test_a_step_of_two_ranks_has_loss_and_gradient_of_one_process(gloo_pool, method: str) -> None:
    one = one_step(method)
    assert sum(float(g.abs().sum()) for g in one[1:]) > 0.1
    for two in gloo_pool.run(one_step, method):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


def one_image_each() -> None:
    """One image on each rank is a batch of two: nothing is refused."""
    module("SimCLR").on_train_batch_start({"image": torch.zeros(1, 1, 8, 8)}, 0)


def test_simclr_counts_the_images_of_all_ranks(gloo_pool) -> None:
    gloo_pool.run(one_image_each)
    with pytest.raises(ValueError, match="the batch holds 1 image"):
        one_image_each()


def mochi_queue() -> list[torch.Tensor]:
    """Queue after a step with mixed negatives, whose draws differ from rank to rank."""
    net = module("MoCHi", warmup_epochs=0).eval()
    torch.manual_seed(distributed.rank())
    mine = distributed.own_rows([2 * ROWS // distributed.world_size()] * distributed.world_size())
    views = [v[mine] for v in _views()]
    batch = {"image": views[0], "views": views, "label": torch.zeros(len(views[0])).long()}
    net.step({**batch, "index": torch.arange(2 * ROWS)[mine]}).loss_fn(None).backward()
    net.on_after_backward()
    return [net.queue.embedding, net.queue.index, net.queue.pointer]


def test_mochis_draws_leave_the_queue_of_all_ranks_equal(gloo_pool) -> None:
    one, (two, three) = mochi_queue(), gloo_pool.run(mochi_queue)
    assert all(torch.equal(a, b) for a, b in zip(two, three, strict=True))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
