"""EAC's loss on two processes with B rows each equals one process with 2B rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_nrml import distributed
from lightning_nrml.losses import EACLoss

ROWS = 3
WEIGHTS = {
    "none": None,
    "soft": [0.2, 0.9, 0, 1, 0.1, 0.7],
    "rank 0 drops all": [0.0, 0, 0, 1, 1, 0],
    "all dropped": [0.0] * 6,
}


def value_and_gradients(rows: slice, weight: list[float] | None) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2 * ROWS, 2, 5, 6, generator=g).double()
    label = torch.tensor([0, 2, 1, 1, 0, 2])
    torch.manual_seed(7)
    net, head = nn.Conv2d(2, 4, 3).double(), nn.Linear(4, 3).double()
    maps, mirrored = net(image[rows]), net(image[rows].flip(3) * 0.9)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)[rows]
    loss = EACLoss()(head(maps.mean((2, 3))), label[rows], maps, mirrored, head.weight, w)
    loss.backward()
    return loss.detach(), [p.grad for p in (*net.parameters(), *head.parameters())]


def one_rank(weight: list[float] | None) -> tuple[Tensor, list[Tensor]]:
    start = distributed.rank() * ROWS
    loss, gradients = value_and_gradients(slice(start, start + ROWS), weight)
    return distributed.mean_over_ranks(loss), [distributed.mean_over_ranks(g) for g in gradients]


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_two_ranks_equal_one_process(gloo_pool, name):
    want, want_gradients = value_and_gradients(slice(None), WEIGHTS[name])
    for got, gradients in gloo_pool.run(one_rank, WEIGHTS[name]):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        for one, other in zip(gradients, want_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
