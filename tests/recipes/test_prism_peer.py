"""The comparison with the official PRISM code, on a made-up clone that uses our own losses and queue."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import noise_settings
import prism_peer
import pytest
import torch
from helpers import trainer
from peer_loop import Loop
from ssl_runs import PooledNet

from lightning_nrml.data import DigitsDataModule
from lightning_nrml.data.noise_types import NoiseConfig
from lightning_nrml.modules import MetricLearning
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig

FILES = {
    "losses/memory_contrastive_loss_w_PRISM.py": """
import torch
from ret_benchmark.losses.registry import LOSS
from ret_benchmark.utils.log_info import log_info
from lightning_nrml.losses import ContrastiveLoss, CrossBatchContrastiveLoss

@LOSS.register("memory_contrastive_loss_w_PRISM")
class MemoryContrastiveLossPRISM(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.center = torch.zeros(cfg.num_classes, cfg.MODEL.HEAD.DIM).cuda()
        self.drop_class = 3 if cfg.NOISE.NOISE_RATE else None

    def forward(self, z, label, rows, row_label, is_noise=None):
        log_info["seen"] = len(z)
        if label is row_label:
            return ContrastiveLoss()(z, label)
        keep = label != self.drop_class if self.drop_class else torch.ones_like(label, dtype=bool)
        return CrossBatchContrastiveLoss()(z, label, rows, row_label, keep.float()), keep
""",
    "modeling/xbm.py": """
from lightning_nrml.memory import FeatureQueue

class XBM:
    def __init__(self, cfg):
        self.queue = FeatureQueue(cfg.XBM.SIZE, cfg.MODEL.HEAD.DIM)

    def get(self):
        return self.queue.get()

    def enqueue_dequeue(self, z, label):
        self.queue.enqueue(z, label)
""",
    "losses/contrastive_loss.py": """
from ret_benchmark.losses.registry import LOSS
from lightning_nrml.losses import ContrastiveLoss as Ours

@LOSS.register("contrastive_loss")
class ContrastiveLoss:
    def __init__(self, cfg):
        self.calls = []

    def __call__(self, z, label, rows, row_label):
        self.calls.append(len(rows))
        return Ours()(z, label)
""",
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "clone" / "ret_benchmark" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield tmp_path / "clone"
    for name in [name for name in sys.modules if name.split(".")[0] == "ret_benchmark"]:
        del sys.modules[name]


def module() -> Any:
    torch.manual_seed(0)
    optimizer = OptimizerConfig(name="sgd", lr=0.1)
    made = MetricLearning(
        "conv4", {"input_size": 8}, 1, embedding_dim=16, memory_size=200, memory_weight=0.1,
        optimizer=optimizer, schedule=ScheduleConfig(name="constant"), channels_last=False,
    )  # fmt: skip
    made.backbone = PooledNet()
    made.head = torch.nn.Linear(16, 16)
    return made.double()


def digits() -> DigitsDataModule:
    data = DigitsDataModule(batch_size=64, m_per_class=8, noise=NoiseConfig("symmetric", 0.3))
    data.setup("fit")
    return data


def told(rate: float) -> Any:
    return argparse.Namespace(rate=rate, warmup=0, classes=10)


def test_with_our_own_losses_the_loop_is_our_trainer(clone: Path, tmp_path: Path) -> None:
    ours, theirs = module(), module()
    trainer(tmp_path, 2, limit_val_batches=0).fit(ours, digits())
    with prism_peer.on_the_cpu():
        net = prism_peer.OfficialMCL(theirs, clone, True, told(0.0)).double()
        Loop(digits(), theirs, net, 2).run()
    for one, two, before in zip(ours.parameters(), theirs.parameters(), module().parameters(), strict=True):
        assert (one - before).abs().max() > 1e-2
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)  # embeddings are float32
    assert len(net.memory.queue) == 200
    assert net.quality() == {
        "noise/precision": pytest.approx(0.7, abs=0.05),
        "noise/recall": 1.0,
    }


def test_dropped_rows_enter_neither_memory_nor_batch_loss(clone: Path) -> None:
    theirs = module()
    with prism_peer.on_the_cpu():
        net = prism_peer.OfficialMCL(theirs, clone, True, told(0.5)).double()
        Loop(digits(), theirs, net, 1).run()
    assert (net.memory.get()[1] != 3).all()
    assert net.quality()["noise/recall"] < 1


def test_without_a_filter_the_memory_is_written_first(clone: Path) -> None:
    theirs = module()
    with prism_peer.on_the_cpu():
        net = prism_peer.OfficialMCL(theirs, clone, False, told(0.5)).double()
        data = digits()
        loop = Loop(data, theirs, net, 1)
        batch = loop.batches(0)[0]
        loop.step(batch, loop.views(batch, 0, 0), 0)
    assert net.criterion.calls == [64, 64]
    assert len(net.memory.get()[1]) == 64
    assert net.quality() == {}


def test_tensors_go_to_a_gpu_again_outside_of_the_block() -> None:
    original = torch.Tensor.cuda
    with prism_peer.on_the_cpu():
        assert torch.zeros(2).cuda().shape == (2,)
    assert torch.Tensor.cuda is original


def test_a_folder_without_the_official_code_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"modeling/xbm\.py does not exist: --official must be"):
        prism_peer.official(tmp_path, "modeling/xbm.py", "XBM")


def test_a_run_is_named_by_its_list_and_its_seed(tmp_path: Path) -> None:
    setting = next(s for s in noise_settings.settings(Path("data")) if s.name == "caltech101_50")
    args = prism_peer.arguments(setting, "prism_avg", 2, 7, tmp_path / "a" / "b" / "c")
    assert "--data.init_args.noise_list=noise_lists.npz:given_r0.5_s2" in args
    assert [a for a in args if "seed" in a][-2:] == ["--seed_everything=7", "--data.init_args.seed=7"]


def test_the_table_pairs_runs(tmp_path: Path) -> None:
    def done(side: str, name: str, value: float) -> None:
        folder = tmp_path / side / "caltech101_50" / "prism_avg" / name
        folder.mkdir(parents=True)
        last = {"val/recall@1": value, "val/map@r": value / 10, "noise/precision": 0.5}
        (folder / "done.json").write_text(json.dumps({"last": last, "cpu_seconds": 60.0}))

    for name, value in (("list0_seed0", 0.3), ("list2_seed10", 0.4)):
        done("ours", name, value)
        done("official", name, value - 0.1)
    done("ours", "list1_seed0", 0.9)  # without its pair
    rows = prism_peer.collect(tmp_path)
    assert [(r["list"], r["seed"]) for r in rows if r["side"] == "official"] == [(0, 0), (2, 10)]
    lines = prism_peer.table("Caltech", rows).splitlines()
    assert lines[-3].startswith(
        "| PRISM AvgSim | ours | 2 | 0.350 ± 0.071 | 0.035 ± 0.007 | 0.500 ± 0.000 | –"
    )
    assert lines[-2].startswith("| PRISM AvgSim | official code | 2 | 0.250 ± 0.071")
    assert lines[-1].startswith(
        "| | ours – official | | +0.100 ± 0.000 | +0.010 ± 0.000 | +0.000 ± 0.000 | –"
    )
