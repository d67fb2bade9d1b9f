"""Two processes with B rows each equal one process with 2B rows: values and gradients, for every loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nrml import distributed
from lightning_nrml.losses import (
    ContrastiveLoss,
    CosineSoftmaxLoss,
    CrossBatchContrastiveLoss,
    MarginLoss,
    PMLLoss,
    SupConLoss,
)

ROWS, INPUT, DIM, CLASSES = 6, 5, 4, 3
LOSSES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "contrastive": (ContrastiveLoss, {"neg_margin": 0.0}),
    "memory": (CrossBatchContrastiveLoss, {"neg_margin": 0.0}),
    "supcon": (SupConLoss, {}),
    "supcon-drop": (SupConLoss, {"empty_positive": "drop"}),
    "softmax": (CosineSoftmaxLoss, {"num_classes": CLASSES, "embedding_dim": DIM}),
    "margin": (MarginLoss, {"num_classes": CLASSES, "nu": 0.1}),
    "margin-one-boundary": (MarginLoss, {"beta": 1.0, "nonzero_loss_cutoff": 1.2}),
    "pml-multi-similarity": (PMLLoss, {"name": "MultiSimilarityLoss"}),
    "pml-mined-triplet": (PMLLoss, {"name": "TripletMarginLoss", "miner": "MultiSimilarityMiner"}),
    "pml-margin": (PMLLoss, {"name": "MarginLoss", "learn_beta": True}),
    "pml-arcface": (PMLLoss, {"name": "ArcFaceLoss", "num_classes": CLASSES, "embedding_size": DIM}),
    "pml-proxy-anchor": (
        PMLLoss,
        {"name": "ProxyAnchorLoss", "num_classes": CLASSES, "embedding_size": DIM},
    ),
}
WEIGHTS = {
    "none": None,
    "mask": [1.0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1],
    "soft": [0.2, 0.9, 0, 0.5, 1, 0.1, 0.3, 0, 1, 0.7, 0.6, 0.4],
    "rank 0 drops all": [0.0] * 6 + [1.0, 1, 0, 1, 1, 1],
    "rank 1 drops all": [1.0, 1, 0.0, 1, 1, 1] + [0] * 6,
    "all dropped": [0.0] * 12,
}


def model(name: str) -> nn.ModuleDict:
    torch.manual_seed(7)
    cls, arguments = LOSSES[name]
    return nn.ModuleDict({"net": nn.Linear(INPUT, DIM), "loss": cls(**arguments)}).double()


def batch() -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * ROWS, INPUT, generator=generator).double()
    memory = torch.randn(9, DIM, generator=generator).double()
    label = torch.tensor([0, 1, 1, 0, 2, 2, 0, 0, 1, 2, 2, 1])
    return x, label, [memory, torch.arange(9) % CLASSES]


def value_and_gradients(
    name: str, rows: slice, weight: list[float] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    parts = model(name)
    x, label, memory = batch()
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)[rows]
    extra = memory if name == "memory" else []
    loss = parts["loss"](parts["net"](x[rows]), label[rows], *extra, w)
    loss.backward()
    assert all(p.grad is not None for p in parts.parameters()), "DDP would stop at an unused parameter"
    gradients = {n: p.grad for n, p in parts.named_parameters()}
    return loss.detach(), gradients


def one_rank(name: str, weight: list[float] | None) -> tuple[Tensor, dict[str, Tensor]]:
    start = distributed.rank() * ROWS
    loss, gradients = value_and_gradients(name, slice(start, start + ROWS), weight)
    mean = {n: distributed.mean_over_ranks(g) for n, g in gradients.items()}  # as DDP does
    return distributed.mean_over_ranks(loss), mean


def one_rank_many(cases: list[tuple[str, list[float] | None]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [one_rank(*case) for case in cases]


@pytest.mark.parametrize("name", list(LOSSES))
def test_two_ranks_equal_one_process(gloo_pool, name):
    cases = [(name, w) for k, w in WEIGHTS.items() if name != "pml-proxy-anchor" or k != "soft"]
    ranks = gloo_pool.run(one_rank_many, cases)
    for case, *results in zip(cases, *ranks, strict=True):
        want, want_gradients = value_and_gradients(name, slice(None), case[1])
        for got, gradients in results:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9, msg=lambda m, c=case: f"{c}: {m}")
            for n, gradient in gradients.items():
                torch.testing.assert_close(
                    gradient,
                    want_gradients[n],
                    rtol=1e-6,
                    atol=1e-9,
                    msg=lambda m, c=case, n=n: f"{c} {n}: {m}",
                )
        if case[1] is None:
            assert want_gradients["net.weight"].abs().sum() > 0
        elif not any(case[1]):
            assert want == 0
            assert all((g == 0).all() for g in want_gradients.values())


def random_loss() -> tuple[Tensor, bool, Tensor]:
    torch.manual_seed(distributed.rank())
    x, label, _ = batch()
    rows = slice(distributed.rank() * ROWS, (distributed.rank() + 1) * ROWS)
    loss = PMLLoss("TripletMarginLoss", triplets_per_anchor=2, margin=1.0)
    before = torch.get_rng_state()
    value = loss(x[rows], label[rows])
    used = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randint(2**31, (1,))  # the one draw that makes the common seed
    return value, torch.equal(used, torch.get_rng_state()), loss(x[rows], label[rows])


def test_random_triplets_are_the_same_on_all_ranks(gloo_pool):
    (first, kept, second), (other, other_kept, other_second) = gloo_pool.run(random_loss)
    assert first == other
    assert second == other_second
    assert first != second
    assert kept
    assert other_kept


def margin_after_unlike_seeds(seed: int | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Loss, gradients (as DDP averages them) and the next number of the global generator."""
    torch.manual_seed(distributed.rank() if seed is None else seed)
    x, label, _ = batch()
    start = distributed.rank() * ROWS
    rows = slice(start, start + ROWS) if seed is None else slice(None)
    x, loss = x[rows].requires_grad_(), MarginLoss(num_classes=CLASSES, nu=0.1).double()
    value = loss(x, label[rows])
    value.backward()
    gradient = distributed.gather(x.grad) / distributed.world_size()
    boundary = distributed.mean_over_ranks(loss.beta.grad)
    return distributed.mean_over_ranks(value), gradient, boundary, int(torch.randint(2**31, (1,)))


def test_margin_draws_what_rank_zero_alone_would(gloo_pool):
    want = margin_after_unlike_seeds(0)
    ranks = gloo_pool.run(margin_after_unlike_seeds, None)
    for got in ranks:
        for one, two in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(one, two)
    assert want[1].abs().sum() > 0
    assert [got[3] == want[3] for got in ranks] == [True, False]  # each rank keeps its own generator
    assert not torch.equal(margin_after_unlike_seeds(1)[0], want[0])


def empty_batches() -> list[float]:
    label = torch.zeros(0, dtype=torch.int64)
    values = []
    for name in LOSSES:
        z = torch.zeros(0, DIM, requires_grad=True)
        extra = [torch.zeros(0, DIM), label] if name == "memory" else []
        loss = model(name).float()["loss"](z, label, *extra)
        loss.backward()
        values.append(loss.item())
    return values


def test_empty_batch_on_all_ranks_is_zero(gloo_pool):
    for values in gloo_pool.run(empty_batches):
        assert values == [0.0] * len(LOSSES)
