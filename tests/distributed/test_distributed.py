"""Collectives: rank order, ragged rows, exact gradients, and what DDP is told to leave alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_nrml import distributed
from lightning_nrml.filters import PRISM
from lightning_nrml.memory import FeatureQueue, SampleLedger

SIZES = [3, 5]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 2, generator=generator), torch.randn(8, 8, generator=generator)


def own(x: Tensor, sizes: list[int]) -> Tensor:
    return x[distributed.own_rows(sizes)]


def gather_kinds(sizes: list[int]) -> list[Tensor]:
    x = own(data()[0], sizes)
    found = distributed.gather_sizes(len(x), x.device)
    assert found == sizes
    kinds = [x, x.double(), x.bfloat16(), (x * 100).long(), x[:, 0] > 0, x.T.contiguous().T]
    return [distributed.gather(k, sizes=found) for k in kinds]


@pytest.mark.parametrize("sizes", [[4, 4], SIZES, [0, 8], [8, 0]])
def test_gather_joins_rows_in_rank_order_for_every_dtype(gloo_pool, sizes):
    x = data()[0]
    want = [x, x.double(), x.bfloat16(), (x * 100).long(), x[:, 0] > 0, x]
    for got in gloo_pool.run(gather_kinds, sizes):
        for one, two in zip(got, want, strict=True):
            assert one.dtype is two.dtype
            assert torch.equal(one, two)
            assert not one.requires_grad


def gradient(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Each rank's loss uses all rows with weights of its own: gradients must add up over ranks."""
    x, weight = data()
    mine = own(x, sizes).clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own differentiable all_gather warns
        keys, found = distributed.gather_ragged(mine, grad=True)
    assert found == sizes
    (own(weight, sizes) @ (keys**2)).sum().backward()
    assert mine.grad is not None
    return keys.detach(), mine.grad


@pytest.mark.parametrize("sizes", [[4, 4], SIZES, [0, 8]])
def test_gradient_of_gathered_rows_sums_over_the_losses_of_all_ranks(gloo_pool, sizes):
    x, weight = data()
    whole = x.clone().requires_grad_()
    (weight @ whole**2).sum().backward()
    results = gloo_pool.run(gradient, sizes)
    for keys, _ in results:
        assert torch.equal(keys, x)
    torch.testing.assert_close(torch.cat([g for _, g in results]), whole.grad, rtol=1e-6, atol=1e-6)


def reductions() -> tuple[Tensor, Tensor, dict[str, int], int]:
    x = torch.tensor([1.0, 2.0]) * (distributed.rank() + 1)
    keep = x.clone()
    total, mean = distributed.reduce_sum(x), distributed.mean_over_ranks(x)
    assert torch.equal(x, keep), "the argument must not change"
    distributed.barrier()
    return total, mean, distributed.broadcast({"rank": distributed.rank()}, 1), distributed.world_size()


def test_reductions_and_broadcast(gloo_pool):
    for total, mean, sent, world in gloo_pool.run(reductions):
        assert total.tolist() == [3.0, 6.0]
        assert mean.tolist() == [1.5, 3.0]
        assert (sent, world) == ({"rank": 1}, 2)


def test_one_process_needs_no_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.world_size(), distributed.rank(), distributed.is_initialized()) == (1, 0, False)
    assert distributed.gather(x, grad=True) is x
    assert not distributed.gather(x).requires_grad
    assert distributed.gather_ragged(x)[1] == [3]
    assert distributed.own_rows([3]) == slice(0, 3)
    assert torch.equal(distributed.mean_over_ranks(x), x.detach())
    assert distributed.broadcast("x") == "x"
    distributed.barrier()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.memory = FeatureQueue(4, 2)
        self.filters = nn.ModuleDict({"prism": PRISM(3, 2, memory_size=4)})
        self.ledger = SampleLedger(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def buffers_after_a_forward() -> dict[str, float]:
    """All buffers hold the rank's number before; DDP overwrites those that it broadcasts."""
    net = Net()
    distributed.exempt_from_ddp_sync(net)
    distributed.exempt_from_ddp_sync(net)  # once by the module, once by the callback
    wrapped = DistributedDataParallel(net)
    for _, buffer in net.named_buffers():
        buffer.fill_(distributed.rank())
    wrapped.eval()  # so that batch norm does not change its statistics by itself
    wrapped(torch.ones(3, 2))
    return {name: float(buffer.float().mean()) for name, buffer in net.named_buffers()}


def test_ddp_broadcasts_statistics_but_not_memories(gloo_pool):
    zero, one = gloo_pool.run(buffers_after_a_forward)
    assert len(one) > 15
    for name, value in one.items():
        assert zero[name] == 0
        assert value == (0 if name.startswith("norm") else 1), name
