"""InsCLR on two ranks: labels, mined rows, loss, gradient, memory and pool are those of one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nrml import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modules"))
from insclr_runs import batch_of, module, prepared


def insclr_step(stage: str) -> dict[str, Any]:
    """Two steps on this rank's rows of a batch of 4 groups, with batch norm in eval mode."""
    net, image = prepared(module(stage=stage, exclude_nearest=5, memory_size=40))
    net.backbone.eval()
    for anchors in ([0, 9, 18, 27], [4, 13, 22, 33]):
        net.zero_grad()
        whole = batch_of(net, image, anchors)
        mine = distributed.own_rows([16 // distributed.world_size()] * distributed.world_size())
        batch = {k: v[mine] for k, v in whole.items() if k != "views"}
        batch["views"] = [v[mine] for v in whole["views"]]
        out = net.step(batch)
        net._select(out, batch)
        parts = out.loss_fn(None)
        parts["loss"].backward()
        net.on_after_backward()
    return {
        "loss": distributed.mean_over_ranks(parts["loss"]),
        "grad": distributed.mean_over_ranks(net.head.weight.grad),
        "deep": distributed.mean_over_ranks(net.backbone.body[0].weight.grad),
        "label": distributed.gather(out.extras["group_label"]),
        "rows": out.extras["memory_index"],
        "claim": out.extras["memory_label"],
        "bank": net.bank.embedding,
        "plain": torch.zeros(1) if net.plain_bank is None else net.plain_bank.embedding,
    }


@pytest.mark.parametrize("stage", ["base", "impr"])
def test_two_ranks_equal_one_process(gloo_pool, stage: str) -> None:
    one = insclr_step(stage)
    for two in gloo_pool.run(insclr_step, stage):
        for key in ("label", "rows", "claim"):
            assert torch.equal(two[key], one[key]), key
        for key in ("loss", "grad", "deep", "bank", "plain"):
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5, msg=key)
    if stage == "impr":
        assert (one["claim"] <= 4).any()
        assert (one["label"] < 0).any()
