"""Two processes equal one process on the concatenated batch for the self-supervised losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.losses import BYOLLoss, InsCLRLoss, MoCHiLoss, NTXentLoss, SwAVLoss, ntxent, sinkhorn

ROWS, INPUT, DIM, QUEUE, HARD, MIXED = 6, 5, 4, 17, 5, 8
WEIGHTS: dict[str, list[float] | None] = {
    "none": None,
    "mask": [1.0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1],
    "soft": [0.2, 0.9, 0, 0.5, 1, 0.1, 0.3, 0, 1, 0.7, 0.6, 0.4],
    "rank 0 drops all": [0.0] * 6 + [1.0, 1, 0, 1, 1, 1],
    "all dropped": [0.0] * 12,
}
Step = Callable[[list[Tensor], Tensor, slice, Tensor | None], Tensor]


def fixed(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simclr(views: list[Tensor], prototypes: Tensor, rows: slice, w: Tensor | None) -> Tensor:
    return NTXentLoss(0.2)(views[0], views[1], w)


def simclr_cold(views: list[Tensor], prototypes: Tensor, rows: slice, w: Tensor | None) -> Tensor:
    return NTXentLoss(0.01)(views[0], views[1], w)


def simclr_in_panels(views: list[Tensor], prototypes: Tensor, rows: slice, w: Tensor | None) -> Tensor:
    block, ntxent.CPU_BLOCK = ntxent.CPU_BLOCK, 50
    try:
        return NTXentLoss(0.2)(views[0], views[1], w)
    finally:
        ntxent.CPU_BLOCK = block


def byol(views: list[Tensor], prototypes: Tensor, rows: slice, w: Tensor | None) -> Tensor:
    targets = fixed(2, 2 * ROWS, DIM)[:, rows]
    return BYOLLoss()(views[0], views[1], targets[0], targets[1], w)


def swav(views: list[Tensor], prototypes: Tensor, rows: slice, w: Tensor | None) -> Tensor:
    scores = [F.normalize(z, dim=1) @ prototypes.T for z in views]
    return SwAVLoss()(scores, [sinkhorn(scores[0]), sinkhorn(scores[1])], [0, 1], w)


def mochi(views: list[Tensor], prototypes: Tensor, rows: slice, w: Tensor | None) -> Tensor:
    """The same draws for the same images."""
    g = torch.Generator().manual_seed(1)
    i, j, k = torch.randint(HARD, (3, 2 * ROWS, MIXED), generator=g)[:, rows]
    a, b = torch.rand(2, 2 * ROWS, MIXED, generator=g, dtype=torch.float64)[:, rows]
    loss = MoCHiLoss(0.2, HARD, MIXED, MIXED)
    draws = {"hard_i": i, "hard_j": j, "alpha": a, "query_hard": k, "beta": b / 2}
    return loss(views[0], views[1].detach(), fixed(QUEUE, DIM), w, **draws)


def insclr(views: list[Tensor], prototypes: Tensor, rows: slice, w: Tensor | None) -> Tensor:
    """The batch against the batches of all ranks, and against a memory."""
    label = torch.tensor([1, 2, -1, 1, 2, 3, 4, 4, -3, 1, 5, 5])
    w = torch.ones(len(views[0])) if w is None else w
    everyone = distributed.gather(views[0], grad=True)
    in_batch = InsCLRLoss(0.1)(views[0], label[rows], everyone, label, w, distributed.gather(w))
    memory = InsCLRLoss(0.1)(views[0], label[rows], fixed(QUEUE, DIM), torch.arange(QUEUE) % 6, w)
    return in_batch + memory


STEPS: list[Step] = [simclr, simclr_cold, simclr_in_panels, byol, swav, mochi, insclr]


def run(step: Step, rows: slice, weight: list[float] | None) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    net = nn.ModuleDict({"net": nn.Linear(INPUT, DIM), "prototypes": nn.Linear(DIM, 5, bias=False)}).double()
    views = [net["net"](x[rows]) for x in fixed(3, 2 * ROWS, INPUT, seed=0)]
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)[rows]
    loss = step(views, net["prototypes"].weight, rows, w)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def one_rank(step: Step, weights: list[list[float] | None]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    start = distributed.rank() * ROWS
    results = []
    for weight in weights:
        loss, gradients = run(step, slice(start, start + ROWS), weight)
        mean = {n: distributed.mean_over_ranks(g) for n, g in gradients.items()}  # as DDP does
        results.append((distributed.mean_over_ranks(loss), mean))
    return results


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.__name__)
def test_two_ranks_equal_one_process(gloo_pool, step):
    if step is swav:  # codes see all images, so a dropped image is still sorted among the others
        assert run(step, slice(None), None)[1]["prototypes.weight"].abs().sum() > 0
    ranks = gloo_pool.run(one_rank, step, list(WEIGHTS.values()))
    for (name, weight), *results in zip(WEIGHTS.items(), *ranks, strict=True):
        want, want_gradients = run(step, slice(None), weight)
        assert want_gradients["net.weight"].abs().sum() > 0 or name == "all dropped"
        for got, gradients in results:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            assert gradients.keys() == want_gradients.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(
                    gradient,
                    want_gradients[key],
                    rtol=1e-8,
                    atol=1e-12,
                    msg=lambda m, n=name, k=key: f"{n}, {k}: {m}",
                )


def local_negatives_only() -> tuple[Tensor, Tensor]:
    rows = slice(distributed.rank() * ROWS, (distributed.rank() + 1) * ROWS)
    a, b = fixed(2, 2 * ROWS, DIM, seed=3)[:, rows]
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    local = F.cross_entropy(logits, torch.arange(2 * ROWS).roll(ROWS))
    return NTXentLoss(0.2)(a, b), local


def test_ntxent_meets_the_negatives_of_the_other_rank(gloo_pool):
    for gathered, local in gloo_pool.run(local_negatives_only):
        assert gathered > local + 0.1


def ragged_codes(
    counts: list[list[int]], epsilon: float, iterations: int, dtype: torch.dtype
) -> list[Tensor]:
    codes = []
    for count in counts:
        start = sum(count[: distributed.rank()])
        scores = score_matrix(sum(count)).to(dtype)[start : start + count[distributed.rank()]]
        codes.append(sinkhorn(scores, epsilon, iterations))
    return codes


def score_matrix(rows: int) -> Tensor:
    return F.normalize(fixed(rows, DIM, seed=9), dim=1) @ F.normalize(fixed(7, DIM, seed=8), dim=1).T


@pytest.mark.parametrize(
    ("epsilon", "iterations", "dtype"),
    [(0.05, 3, torch.float64), (0.01, 8, torch.float64), (0.01, 3, torch.float16)],
)
def test_sinkhorn_of_uneven_ranks_equals_one_process(gloo_pool, epsilon, iterations, dtype):
    counts = [[8, 8], [3, 13], [16, 0], [0, 5], [0, 0]]
    ranks = gloo_pool.run(ragged_codes, counts, epsilon, iterations, dtype)
    tight = {"rtol": 1e-9, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-8}
    for count, *parts in zip(counts, *ranks, strict=True):
        want = sinkhorn(score_matrix(sum(count)).to(dtype), epsilon, iterations)
        assert [len(p) for p in parts] == count
        torch.testing.assert_close(torch.cat(parts), want, **tight)
        if count == [3, 13]:
            alone = sinkhorn(score_matrix(16).to(dtype)[:3], epsilon, iterations)
            assert (alone - want[:3]).abs().max() > 0.05


def extreme() -> Tensor:
    return distributed.reduce_max(torch.tensor([[1.0, -3.0], [-1.0, 3.0]])[distributed.rank()])


def test_reduce_max_is_entry_by_entry_and_leaves_its_input(gloo_pool):
    for got in gloo_pool.run(extreme):
        assert got.tolist() == [1.0, 3.0]
    x = torch.tensor([2.0], requires_grad=True)
    assert distributed.reduce_max(x).tolist() == [2.0]
    assert not distributed.reduce_max(x).requires_grad
