"""Von Mises-Fisher densities on the unit sphere, in the log domain and float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Two Debye terms leave a relative error of about 0.01 / order^3, i.e. below 4e-8 from this order on.
_MIN_ORDER = 64.0


def _log_scaled_bessel(order: float, kappa: Tensor) -> Tensor:
    """``log(I_order(kappa) / kappa^order)`` by Debye's uniform expansion (DLMF 10.41.3), large orders.

    Divided by the power, the function is finite and smooth at ``kappa = 0``.
    """
    root = torch.sqrt(1 + (kappa / order) ** 2)
    t = 1 / root
    u1 = (3 * t - 5 * t**3) / 24
    u2 = (81 * t**2 - 462 * t**4 + 385 * t**6) / 1152
    return (
        order * (root - math.log(order) - torch.log1p(root))
        - 0.5 * torch.log(2 * math.pi * order * root)
        + torch.log1p(u1 / order + u2 / order**2)
    )


def log_normalizer(kappa: Tensor, dim: int) -> Tensor:
    """``log C_d(kappa)`` of the von Mises-Fisher density ``C_d(kappa) exp(kappa mu.x)``.

    ``C_d(kappa) = kappa^(d/2-1) / ((2 pi)^(d/2) I_{d/2-1}(kappa))``. Library Bessel functions underflow
    at the orders of embedding spaces (``I_255(10)`` is 0 in float64), hence an asymptotic expansion;
    for small ``d`` it is taken at a higher order and brought down by the recurrence of ``I``, which is
    stable in that direction. Relative error of ``C_d`` below 1e-7 for every ``d >= 2``.

    Args:
        kappa: concentrations >= 0, any shape; 0 gives the uniform density of the sphere.
        dim: dimension ``d`` of the embedding space, at least 2.

    Returns:
        float64 tensor of the shape of ``kappa``.

    Raises:
        ValueError: if ``dim < 2``.
    """
    if dim < 2:
        raise ValueError(f"dim must be at least 2 for a density on the unit sphere, got {dim}.")
    kappa = kappa.double()
    target = dim / 2 - 1
    steps = max(0, math.ceil(_MIN_ORDER - target))
    order = target + steps
    log_bessel = _log_scaled_bessel(order, kappa)
    if steps:
        # J_v = I_v / kappa^v obeys J_{v-1} = kappa^2 J_{v+1} + 2 v J_v
        ratio = torch.exp(_log_scaled_bessel(order + 1, kappa) - log_bessel)
        for step in range(steps):
            growth = kappa**2 * ratio + 2 * (order - step)
            log_bessel = log_bessel + torch.log(growth)
            ratio = 1 / growth
    return -0.5 * dim * math.log(2 * math.pi) - log_bessel


def concentration(rbar: Tensor, dim: int, max_rbar: float = 1.0) -> Tensor:
    """``kappa`` of a class from the length of its mean unit vector (Banerjee et al., JMLR 2005, eq. 4.4).

    ``kappa = rbar (d - rbar^2) / (1 - rbar^2)``.

    Args:
        rbar: mean resultant lengths in [0, 1], any shape.
        dim: dimension ``d`` of the embedding space.
        max_rbar: clamp; a class of one row or of duplicates has ``rbar = 1``, i.e. infinite ``kappa``.

    Returns:
        float64 tensor of the shape of ``rbar``.
    """
    rbar = rbar.double().clamp(max=max_rbar)
    return rbar * (dim - rbar**2) / (1 - rbar**2)
