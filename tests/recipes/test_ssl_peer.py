"""The comparison with lightly: both sides take the same steps where they are made equal, and the table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trainer
from peer_loop import Loop
from runner import run_missing
from ssl_runs import digits, module
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml.models import load_weights

pytest.importorskip("lightly", reason="the extra 'bench' is not installed")
FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # dataclasses look themselves up there
    spec.loader.exec_module(loaded)
    return loaded


ssl_table = sys.modules.get("ssl_table") or load("ssl_table")
nets = load("ssl_peer_nets")
ssl_peer = load("ssl_peer")
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "swav": "SwAV"}
# lightly's examples have a pass per view; its memory bank cuts batches that do not divide it
OPTIONS: dict[str, dict[str, Any]] = {"simclr": {"joint_views": False}, "moco": {"queue_size": 128}}


def layers(net: nn.Module) -> list[nn.Module]:
    return [part for part in net.modules() if isinstance(part, nn.Linear | nn.BatchNorm1d)]


def make_equal(ours: Any, peer: Any) -> None:
    """Lightly's heads start from our weights; offsets that ours do not have stay 0."""
    heads = [(ours.projector, peer.projection_head)]
    if hasattr(ours, "predictor"):
        heads.append((ours.predictor, peer.prediction_head))
    if hasattr(ours, "prototypes"):
        heads.append((ours.prototypes, peer.prototypes))
    for one, two in heads:
        for mine, theirs in zip(layers(one), layers(two), strict=True):
            theirs.weight.data.copy_(mine.weight.data)
            if theirs.bias is not None:
                free = mine.bias is not None and mine.bias.requires_grad
                theirs.bias.data.copy_(mine.bias.data) if free else theirs.bias.data.zero_()
                theirs.bias.requires_grad_(free)
    if isinstance(peer, nets.TaughtPeer):
        peer.copy_for_momentum()
    if isinstance(peer, nets.MoCoPeer):
        peer.criterion.memory_bank.bank.copy_(ours.queue.get()[0])


class JointSwAV(nets.SwAVPeer):
    """All crops of one size in one pass, as the official code and ours have it."""

    def project(self, views: list[Tensor]) -> list[Tensor]:
        z = self.projection_head(self.backbone(torch.cat(views)))
        return list(F.normalize(z, dim=1).chunk(len(views)))


@pytest.mark.parametrize("name", list(METHODS))
def test_runs_of_equal_parts_end_with_equal_weights(name: str, tmp_path: Path) -> None:
    ours = module(METHODS[name], **OPTIONS.get(name, {})).double()
    peer = (JointSwAV if name == "swav" else nets.PEERS[name])(ours).double()
    make_equal(ours, peer)
    start = [p.detach().clone() for p in ours.backbone.parameters()]
    data = digits(METHODS[name])
    Loop(data, ours, peer, 3).run()
    trainer(tmp_path, 3, limit_val_batches=0).fit(ours, digits(METHODS[name]))
    for one, two, before in zip(ours.backbone.parameters(), peer.backbone.parameters(), start, strict=True):
        assert (one - before).abs().max() > 1e-3
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_the_loop_given_our_simclr_is_our_trainer(tmp_path: Path) -> None:
    one, two = module("SimCLR"), module("SimCLR")
    Loop(digits("SimCLR"), one, nets.Ours(one), 2).run()
    trainer(tmp_path, 2, limit_val_batches=0).fit(two, digits("SimCLR"))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_run_of_the_peer_trains_and_probes_its_backbone(tmp_path: Path) -> None:
    """The queue that runs ``nrml`` runs the peer too, and its probe starts from what the peer wrote."""
    setting = next(s for s in ssl_table.settings() if s.name == "digits")
    folder = tmp_path / "seed0"
    stages = ssl_table.commands(setting, "byol", 0, folder, tmp_path, tmp_path, 1)
    stages[1][-1:-1] = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    run = ssl_peer.job("lightly", "byol", stages, folder)
    run_missing([run], tmp_path, 1)
    found = json.loads((folder / "done.json").read_text())
    assert 0.5 < found["knn_top1"] <= 1
    assert 0.1 < found["probe_top1"] <= 1
    peer, probe = (folder / "command.txt").read_text().splitlines()
    assert peer.startswith("peer_run('byol', ['fit'")
    assert probe.endswith(f"--model.init_args.init_weights={folder}/pretrain/backbone.pt")
    saved = torch.load(folder / "pretrain" / "backbone.pt")
    model = ssl_peer.NRMLCLI(stages[0][1:], run=False).model
    load_weights(model, str(folder / "pretrain" / "backbone.pt"))
    assert all(torch.equal(value, saved[key]) for key, value in model.backbone.state_dict().items())


def test_table_pairs_seeds_and_prefers_own_runs(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path / "out", ours=tmp_path / "table")

    def done(place: str, seed: int, value: float) -> None:
        folder = tmp_path / place / "digits" / "moco" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "done.json").write_text(json.dumps({"knn_top1": value, "probe_top1": value / 2}))

    for seed, value in enumerate((0.8, 0.6)):
        done("table", seed, value)
        done("out/lightly", seed, value - 0.1)
    done("out/ours", 1, 0.4)
    done("table", 2, 0.1)  # without its pair
    rows = ssl_peer.collect(args)
    assert len(rows) == 5
    lines = ssl_peer.table("Digits", rows).splitlines()
    moco = next(i for i, line in enumerate(lines) if line.startswith("| MoCo-v2 | ours"))
    assert lines[moco] == "| MoCo-v2 | ours | 2 | 0.600 ± 0.283 | 0.300 ± 0.141 |"
    assert lines[moco + 1] == "| MoCo-v2 | lightly | 2 | 0.600 ± 0.141 | 0.300 ± 0.071 |"
    assert lines[moco + 2] == "| | ours – lightly | | +0.000 ± 0.141 | +0.000 ± 0.071 |"
