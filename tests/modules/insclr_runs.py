"""Tiny InsCLR runs on digits and steps on made-up batches, shared by the tests of the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.data import DigitsDataModule
from lightning_nrml.data.views import InsCLRViews
from lightning_nrml.memory import MiningConfig
from lightning_nrml.modules import InsCLR
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig

#: thresholds between the similarities of :func:`prepared`, and between those of an untrained net on digits
MADE_UP = MiningConfig(positive=0.6, negative=0.4, in_batch=0.65, hit=0.4, pick=2, rounds=2)
DIGITS = MiningConfig(positive=0.97, negative=0.8, in_batch=0.9, hit=0.8, pick=2, rounds=2)


def digits(**kwargs: Any) -> DigitsDataModule:
    """Digits in batches of 8 anchors with 3 neighbours, augmented and plain."""
    view = InsCLRViews(8, crop_scale=None, flip=0.0, degrees=10, translate=0.1)
    return DigitsDataModule(**{"batch_size": 32, "train_view": view, "test_size": 1297, **kwargs})


def module(**kwargs: Any) -> InsCLR:
    """A tiny net; equal weights for equal arguments."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "backbone": "conv4",
        "backbone_kwargs": {"input_size": 8, "widths": [8, 16], "strides": [2, 2]},
        "in_channels": 1,
        "stage": "impr",
        "head": "linear",
        "embedding_dim": 12,
        "pool_size": 20,
        "memory_size": 60,
        "mining": MADE_UP,
        "optimizer": OptimizerConfig("adam", 2e-3),
        "schedule": ScheduleConfig("cosine", 0.1),
    }
    return InsCLR(**{**options, **kwargs})


def prepared(net: InsCLR, num: int = 80) -> tuple[InsCLR, Tensor]:
    """A module outside a trainer whose pool and memory are filled from ``num`` made-up images, in groups."""
    source = torch.Generator().manual_seed(1)
    kinds = torch.rand(8, 1, 8, 8, generator=source)
    image = kinds[torch.arange(num) % 8] + 0.25 * torch.randn(num, 1, 8, 8, generator=source)
    net.make_memories(num)
    net.eval()
    with torch.no_grad():
        # an untrained net gives all images nearly one direction: take the mean away
        net.head.bias.copy_(-net.head.weight @ net.backbone(image).mean(dim=0))
        z = net.embed(image)
    net.train()
    similarity = z @ z.T - 9 * torch.eye(num)
    value, near = similarity.topk(net.pool_size, dim=1)
    net.pool.fill(torch.arange(num), near, value, 0)
    for bank in (net.bank, net.plain_bank):
        if bank is not None:
            bank.write(torch.arange(num), F.normalize(z + 0.02 * torch.randn(z.shape, generator=source)), 0)
    net._draw_seed = 5
    return net, image


def batch_of(net: InsCLR, image: Tensor, anchors: list[int]) -> dict[str, Any]:
    """The batch that a sampler makes of these anchors; the augmented view is a noisy one."""
    near = net.pool.neighbour[anchors, : net.neighbours].long()
    index = torch.cat([torch.tensor(anchors)[:, None], near], dim=1).flatten()
    source = torch.Generator().manual_seed(2)
    noise = 0.1 * torch.randn(len(index), *image.shape[1:], generator=source)
    views = [image[index] + noise, image[index]]
    return {"image": views[0], "views": views, "label": torch.zeros(len(index)).long(), "index": index}
