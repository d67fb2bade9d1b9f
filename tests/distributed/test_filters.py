"""The filter chain on two ranks: decisions, memories and suggestions are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nrml import distributed
from lightning_nrml.filters import PRISM, FixedFilter
from lightning_nrml.filters.chain import FilterChain, gathered_context, select
from lightning_nrml.memory import SampleLedger

CLASSES, DIM, STEPS, ROWS = 3, 6, 5, 8
FILTERS: dict[str, dict[str, Any]] = {
    "avg": {"similarity": "avg", "window": 1},
    "avg-window": {"similarity": "avg", "window": 3, "warmup_steps": 2},
    "vmf": {"similarity": "vmf", "window": 2},
}
# rows per rank in each step: equal, ragged, and a rank without any
SPLITS = {
    "equal": [[4, 4]] * STEPS,
    "ragged": [[3, 5], [5, 3], [3, 5], [7, 1], [1, 7]],
    "empty rank": [[0, 8], [8, 0], [4, 4], [0, 8], [8, 0]],
}
# dataset indices that a second filter drops: rank 0's rows of step 3, and all of step 4 ("equal" split)
DROPPED = [*range(3 * ROWS, 3 * ROWS + 4), *range(4 * ROWS, 5 * ROWS)]


class Holder(nn.Module):
    """A user's module with filters, as the callback leaves it."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        mask = torch.ones(STEPS * ROWS, dtype=torch.bool)
        mask[DROPPED] = False
        self.filters = FilterChain()
        self.filters["prism"] = PRISM(CLASSES, DIM, noise_rate=0.4, memory_size=20, **options)
        self.filters["fixed"] = FixedFilter(mask)
        self.filters.mode.update(prism="batch", fixed="batch")
        self.ledger = SampleLedger(STEPS * ROWS)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(STEPS * ROWS) % CLASSES
    z = 5 * torch.eye(DIM)[label] + torch.randn(len(label), DIM, generator=generator)
    return z, label


def run_steps(options: dict[str, Any], splits: list[list[int]]) -> dict[str, Any]:
    """A chain's life over five batches; ``splits`` says how many rows of each this rank holds."""
    holder, (z, label) = Holder(options), data()
    weights, sizes, thresholds = [], [], []
    for step, split in enumerate(splits):
        rows = distributed.own_rows(split) if len(split) > 1 else slice(0, ROWS)
        index = torch.arange(step * ROWS, (step + 1) * ROWS)[rows]
        own = select(holder, embedding=z[index], label=label[index], index=index)
        weights.append(own.weight)
        sizes.append(len(own.score))
        thresholds.append(own.threshold)
        committed = holder.filters.commit()
        assert committed is not None
        ctx, selection = committed
        suggested = holder.filters["prism"].suggest(ctx)
        holder.ledger.record(ctx.index, selection.weight, selection.score, suggested)
    state = {k: v.clone() for k, v in holder.state_dict().items()}
    return {"weights": weights, "sizes": sizes, "thresholds": torch.stack(thresholds), "state": state}


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("name", list(FILTERS))
def test_chain_on_two_ranks_equals_one_process(gloo_pool, name, split):
    want = run_steps(FILTERS[name], [[ROWS]] * STEPS)
    zero, one = gloo_pool.run(run_steps, FILTERS[name], SPLITS[split])
    for step, sizes in enumerate(SPLITS[split]):
        assert [zero["sizes"][step], one["sizes"][step]] == sizes
        joined = torch.cat([zero["weights"][step], one["weights"][step]])
        assert torch.equal(joined, want["weights"][step]), step
    kept = torch.cat(want["weights"])
    assert 0 < kept[: 3 * ROWS].sum() < 3 * ROWS, "PRISM decides something"
    assert not kept[DROPPED].any()
    assert kept[3 * ROWS + 4 : 4 * ROWS].any()
    for got in (zero, one):
        assert torch.equal(got["thresholds"].nan_to_num(), want["thresholds"].nan_to_num())
        assert got["state"].keys() == want["state"].keys()
        for key, value in want["state"].items():
            assert torch.equal(got["state"][key].nan_to_num(), value.nan_to_num()), key


def optional_fields() -> dict[str, Tensor]:
    logits, loss = torch.arange(24.0).view(8, 3), torch.arange(8.0)
    rows = slice(0, 3) if distributed.rank() == 0 else slice(3, 8)
    ctx, own = gathered_context(
        embedding=torch.ones(8, 2)[rows] * 7,
        label=torch.arange(8)[rows],
        index=torch.arange(8)[rows] * 10,
        logits=logits[rows].bfloat16().requires_grad_(),
        per_sample_loss=loss[rows].requires_grad_(),
    )
    assert own == rows
    assert ctx.logits is not None
    assert ctx.per_sample_loss is not None
    assert not ctx.logits.requires_grad
    return {
        "logits": ctx.logits,
        "loss": ctx.per_sample_loss,
        "index": ctx.index,
        "norm": ctx.embedding.norm(dim=1),
    }


def test_logits_and_losses_are_gathered_with_the_rows(gloo_pool):
    for got in gloo_pool.run(optional_fields):
        assert torch.equal(got["logits"], torch.arange(24.0).view(8, 3).bfloat16())
        assert torch.equal(got["loss"], torch.arange(8.0))
        assert torch.equal(got["index"], torch.arange(8) * 10)
        torch.testing.assert_close(got["norm"], torch.ones(8))
