"""Multi-label metrics and losses over two gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_nrml import distributed
from lightning_nrml.filters import MultiLabelPRISM
from lightning_nrml.filters.chain import gathered_context
from lightning_nrml.losses import (
    MultiLabelASLLoss,
    MultiLabelBCELoss,
    MultiLabelELRLoss,
    MultiLabelJoCoRLoss,
    MultiLabelSATLoss,
    RCMLLoss,
)
from lightning_nrml.memory import LabelLedger
from lightning_nrml.metrics import FilterQuality, MultiLabelMetrics, multilabel_metrics

SAMPLES, LABELS = 41, 5
PARTS = {
    "ragged batches": [[range(20), range(20, 33)], [range(33, SAMPLES)]],
    "padded by a sampler": [[range(0, SAMPLES, 2)], [[*range(1, SAMPLES, 2), 0, 2]]],
    "rank 1 has nothing": [[range(SAMPLES)], []],
}


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    target = torch.rand(SAMPLES, LABELS, generator=g) < 0.3
    target[:, 4] = False
    return torch.sigmoid(torch.randn(SAMPLES, LABELS, generator=g) + target), target


def metric_on_a_rank(name: str) -> dict[str, Any]:
    prob, target = scores()
    metric = MultiLabelMetrics(LABELS)
    for rows in PARTS[name][distributed.rank()]:
        at = torch.tensor(list(rows))
        metric.update(prob[at], target[at], at)
    return metric.compute()


@pytest.mark.parametrize("name", PARTS)
def test_metrics_of_two_ranks_equal_one_process(gloo_pool, name):
    want = multilabel_metrics(*scores())
    for got in gloo_pool.run(metric_on_a_rank, name):
        assert got["num_samples"] == SAMPLES
        assert got["num_absent"] == 1
        for key in ("map_macro", "map_micro", "f1_macro", "f1_micro", "calibration_gap_abs"):
            assert got[key] == pytest.approx(want[key], abs=1e-12), key
        torch.testing.assert_close(got["ap"], want["ap"], equal_nan=True)


# ---- losses ---------------------------------------------------------------------------------------

ROWS = 6
WEIGHTS = {
    "none": None,
    "soft": 0.7,
    "rank 0 drops all": 0.0,
}


class Nets(nn.Module):
    """Two small nets with early features, and one loss on them; four visits to twelve samples."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.name = name
        self.first, self.second = nn.Linear(4, LABELS), nn.Linear(4, LABELS)
        self.loss: Any = {
            "bce": MultiLabelBCELoss,
            "asl": MultiLabelASLLoss,
            "elr": lambda: MultiLabelELRLoss(14, LABELS),
            "sat": lambda: MultiLabelSATLoss(14, LABELS, 0.8, 0),
            "jocor": lambda: MultiLabelJoCoRLoss(0.3, 0.4),
            "jocor-entry": lambda: MultiLabelJoCoRLoss(0.3, 0.4, choose="entry"),
            "rcml": lambda: RCMLLoss(sigma=4.0),
            "rcml-flip": lambda: RCMLLoss(sigma=4.0),
        }[name]()

    def forward(self, x: torch.Tensor, label: torch.Tensor, index: torch.Tensor, w: Any) -> torch.Tensor:
        a, b = self.first(x), self.second(x)
        if self.name.startswith("jocor"):
            return self.loss(a, b, label, w)
        if self.name == "rcml":
            return self.loss(a, b, label, a.sin(), b.sin(), 0.5, w)
        if self.name == "rcml-flip":
            return self.loss(a, a + 0.2 * b, label, None, None, 0.8, w, 0.5)
        return self.loss(a + b, label, index, w)


def train(name: str, weight: float | None, rows: slice) -> list[Any]:
    """Two optimiser steps; values, final weights and the memory."""
    nets = Nets(name).double()
    g = torch.Generator().manual_seed(1)
    values = []
    for _ in range(2):
        x = torch.randn(2 * ROWS, 4, generator=g, dtype=torch.float64)
        label = (torch.rand(2 * ROWS, LABELS, generator=g) < 0.4).long()
        index = torch.randperm(14, generator=g)[: 2 * ROWS]
        index[7] = index[2]  # on the other rank
        w = None
        if weight is not None:
            w = torch.rand(2 * ROWS, LABELS, generator=g)
            w[:ROWS] *= weight
            w[:, 1] = 0
        nets.zero_grad()
        loss = nets(x[rows], label[rows], index[rows], None if w is None else w[rows])
        loss.backward()
        values.append(distributed.mean_over_ranks(loss).item())
        with torch.no_grad():
            for p in nets.parameters():
                p -= 0.5 * distributed.mean_over_ranks(p.grad)  # as DDP does
    return [values, [p.detach() for p in nets.parameters()], getattr(nets.loss, "target", None)]


def train_all(name: str) -> list[Any]:
    start = distributed.rank() * ROWS
    return [train(name, w, slice(start, start + ROWS)) for w in WEIGHTS.values()]


@pytest.mark.parametrize("name", ["bce", "asl", "elr", "sat", "jocor", "jocor-entry", "rcml", "rcml-flip"])
def test_losses_of_two_ranks_equal_one_process(gloo_pool, name):
    wanted = [train(name, w, slice(None)) for w in WEIGHTS.values()]
    assert len({w[0][1] for w in wanted}) == 3
    for got in gloo_pool.run(train_all, name):
        for (values, parameters, memory), want in zip(got, wanted, strict=True):
            assert values == pytest.approx(want[0], rel=1e-6)
            torch.testing.assert_close(parameters, want[1], rtol=1e-6, atol=1e-8)
            if memory is not None:
                torch.testing.assert_close(memory, want[2], equal_nan=True)
                assert (memory.nan_to_num(0) != 0).any()


# ---- filter, ledger and quality of labels -----------------------------------------------------------

BATCH, STEPS = 24, 8


def filtered() -> list[Any]:
    """MultiLabelPRISM, ledger and quality on this rank's part (unequal parts) of the same batches."""
    g = torch.Generator().manual_seed(0)
    samples, dim, world = 60, 6, distributed.world_size()
    clean = (torch.rand(samples, LABELS, generator=g) < 0.4).long()
    given = clean ^ (torch.rand(samples, LABELS, generator=g) < 0.2)
    direction = torch.randn(LABELS, dim, generator=g)
    part = MultiLabelPRISM(LABELS, dim, samples, warmup_steps=3, memory_size=40)
    ledger, quality, own = LabelLedger(samples, LABELS), FilterQuality(LABELS), []
    for step in range(STEPS):
        index = torch.randint(0, samples, (BATCH,), generator=g)  # with repeats, also over ranks
        z = clean[index].float() @ direction + 0.5 * torch.randn(BATCH, dim, generator=g)
        logits = z @ direction.T
        cut = 5 + step
        mine = slice(None) if world == 1 else (slice(0, cut), slice(cut, BATCH))[distributed.rank()]
        local = index[mine]
        whole, rows = gathered_context(
            embedding=z[mine], label=given[local], index=local, logits=logits[mine], step=step
        )
        selection = part.select(whole)
        part.update(whole, selection)
        ledger.record(whole.index, selection.weight, selection.score)
        chosen = selection.rows(rows)
        quality.update(chosen.weight >= 0.5, given[local] != clean[local], chosen.score, given[local])
        own.append(chosen.weight)
    state = {**part.state_dict(), **ledger.state_dict(prefix="ledger.")}
    return [own, {k: v.clone() for k, v in state.items()}, quality.compute()]


def test_label_weights_of_two_ranks_equal_one_process(gloo_pool):
    weights, state, quality = filtered()
    assert 0 < sum(int((w < 0.5).sum()) for w in weights) < BATCH * LABELS * STEPS / 2
    zero, one = gloo_pool.run(filtered)
    for step, weight in enumerate(weights):
        assert torch.equal(torch.cat([zero[0][step], one[0][step]]), weight)
    for got in (zero, one):
        assert got[1].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(value.nan_to_num(9), got[1][name].nan_to_num(9)), name
        assert got[2] == pytest.approx(quality, nan_ok=True)
    assert quality["extra_recall"] > 0
