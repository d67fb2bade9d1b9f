"""Every filter on two ranks: decisions, memories and counters are those of one process."""

from __future__ import annotations

import torch
from filter_cases import FILTERS, ROWS, rows_of, stream
from helpers import assert_same_state

from lightning_nrml import distributed
from lightning_nrml.filters.chain import gathered_context
from lightning_nrml.types import Selection


def run_on_ranks() -> dict[str, tuple[list[Selection], dict[str, torch.Tensor]]]:
    """Every filter on this rank's half of each batch (unequal halves)."""
    world = distributed.world_size()
    results = {}
    for name, make in FILTERS.items():
        part, own = make(), []
        for step, ctx in enumerate(stream()):
            cut = 10 + step
            mine = slice(None) if world == 1 else (slice(0, cut), slice(cut, ROWS))[distributed.rank()]
            local = rows_of(ctx, mine)
            whole, rows = gathered_context(
                embedding=3 * local.embedding,
                label=local.label,
                index=local.index,
                logits=local.logits,
                per_sample_loss=local.per_sample_loss,
                proxies=local.proxies,
                teacher=local.teacher,
            )
            selection = part.select(whole)
            part.update(whole, selection)
            own.append(selection.rows(rows))
        results[name] = (own, {k: v.clone() for k, v in part.state_dict().items()})
    return results


def test_two_ranks_decide_as_one_process(gloo_pool) -> None:
    want = run_on_ranks()
    zero, one = gloo_pool.run(run_on_ranks)
    for name, (selections, state) in want.items():
        for step, selection in enumerate(selections):
            first, second = zero[name][0][step], one[name][0][step]
            assert torch.equal(torch.cat([first.weight, second.weight]), selection.weight), name
            if selection.pair_weight is not None:
                pairs = torch.cat([first.pair_weight, second.pair_weight])
                assert torch.equal(pairs, selection.pair_weight)
        for got in (zero, one):
            assert_same_state(got[name][1], state)
