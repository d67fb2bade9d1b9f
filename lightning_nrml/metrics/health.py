"""Label-free health of a representation: effective rank, spread, alignment and uniformity.

All functions take rows of any length and scale and work on unit rows, on any device, without gradient;
float64 stays, everything else is computed in float32 (singular values always in float64).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_nrml.metrics.search import prepare_rows

# entries of one block of the pairwise similarities: 16 MiB of float32
_BLOCK = 1 << 22


def rankme(embedding: Tensor) -> Tensor:
    """RankMe, the effective rank: ``exp(-sum p_k log p_k)`` with p_k = sigma_k / sum sigma.

    Source: Garrido et al., "RankMe" (ICML 2023, arXiv 2210.02885), eq. 1, on uncentred rows. The
    paper's 1e-7 beside p_k only guards log 0; here 0 log 0 = 0 instead, so that closed forms hold.

    Args:
        embedding: ``(N, D)``, N >= 1.

    Returns:
        0-d float64 in [1, min(N, D)]: 1 = all rows lie on one line, min(N, D) = every direction is used
        alike; 0 if all rows are zero.

    Raises:
        ValueError: for a wrong shape, no rows, or NaN/infinite rows.
    """
    sigma = torch.linalg.svdvals(_rows(embedding).double())
    total = sigma.sum()
    if not total > 0:
        return total
    return torch.special.entr(sigma / total).sum().exp()


def embedding_std(embedding: Tensor) -> Tensor:
    """Standard deviation of each column of the unit rows, averaged over the columns.

    Source: Chen & He, "SimSiam" (CVPR 2021, arXiv 2011.10566), section 4.1. The population formula.

    Args:
        embedding: ``(N, D)``, N >= 1.

    Returns:
        0-d tensor in [0, 1/sqrt(D)]: 0 = every image has the same embedding, 1/sqrt(D) = spread like an
        isotropic Gaussian.

    Raises:
        ValueError: for a wrong shape, no rows, or NaN/infinite rows.
    """
    return _rows(embedding).std(dim=0, correction=0).mean()


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    """Mean distance of positive pairs, ``mean ||x_i - y_i||^alpha``; 0 is perfect, 2^alpha the worst.

    Source: Wang & Isola, ICML 2020, arXiv 2005.10242, section 4.2.

    Args:
        x: ``(N, D)``, N >= 1.
        y: ``(N, D)``; row i is the other view of row i of ``x``.
        alpha: exponent, above 0.

    Raises:
        ValueError: for shapes that differ, no rows, or NaN/infinite rows.
    """
    if x.shape != y.shape:
        raise ValueError(f"alignment compares row by row: x is {tuple(x.shape)} but y is {tuple(y.shape)}.")
    difference = _rows(x) - _rows(y)
    return torch.linalg.vector_norm(difference, dim=1).pow(alpha).mean()


def uniformity(embedding: Tensor, t: float = 2.0) -> Tensor:
    """Logarithm of the mean Gaussian potential of all pairs i < j, ``log mean exp(-t ||x_i - x_j||^2)``.

    Source: Wang & Isola, ICML 2020, arXiv 2005.10242, section 4.2. Works in blocks: the square matrix
    of pairs never exists.

    Args:
        embedding: ``(N, D)``, N >= 2.
        t: sharpness, above 0.

    Returns:
        0-d float64 in [-4t, 0]: 0 = collapsed, lower = more uniform on the sphere.

    Raises:
        ValueError: for a wrong shape, fewer than two rows, or NaN/infinite rows.
    """
    rows = _rows(embedding)
    n = len(rows)
    if n < 2:
        raise ValueError("uniformity needs pairs: give at least 2 rows, got 1.")
    step = max(1, _BLOCK // n)
    parts = []
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, n, step):
            block = rows[start : start + step]
            # unit rows: ||x - y||^2 = 2 - 2 x.y (rounding must not make a distance negative)
            exponent = (2 * t * (block @ rows[start:].T - 1)).clamp_(max=0)
            below = torch.ones_like(exponent, dtype=torch.bool).tril_()
            parts.append(exponent.masked_fill_(below, -torch.inf).double().logsumexp(dim=(0, 1)))
    return torch.stack(parts).logsumexp(dim=0) - math.log(n * (n - 1) / 2)


def _rows(embedding: Tensor) -> Tensor:
    """Unit rows, at least one."""
    if embedding.ndim == 2 and not len(embedding):
        raise ValueError("embedding has no rows: give at least one.")
    return prepare_rows(embedding)
