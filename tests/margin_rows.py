"""Rows for the tests of the margin loss and of its miner."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 20, dim: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(n, dim, generator=seeded(seed)), torch.arange(n) % classes


def at_distances(distances: list[float], dim: int) -> Tensor:
    """``(1 + len, dim)`` float64 unit rows: the first one, and one at each of these distances from it."""
    rows = torch.zeros(1 + len(distances), dim, dtype=torch.float64)
    rows[0, 0] = 1
    for i, d in enumerate(distances):
        cosine = 1 - d * d / 2
        rows[i + 1, 0], rows[i + 1, 1] = cosine, math.sqrt(1 - cosine * cosine)
    return rows
