"""NT-Xent, the loss of SimCLR, without the square similarity matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_nrml import distributed
from lightning_nrml.losses.base import full_precision, prepare, safe_divide, unit_rows

# Similarities held at a time: 4 MB stay in the cache of a CPU core, 32 MB keep a GPU busy.
CPU_BLOCK = 2**20
GPU_BLOCK = 2**23
# exp(cos / T) needs no shift in float32 down to the first (e^33 at most), in float64 down to the second.
MIN_TEMPERATURE_FP32 = 0.03
MIN_TEMPERATURE = 0.003


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross entropy between two views of a batch.

    With unit rows, ``S = cos / temperature`` and the 2N rows of both views of the gathered batch, each row
    is an anchor whose positive is its other view: ``L_i = log sum_{a != i} exp S_ia - S_ip``. The loss is
    the mean over the 2N anchors (the official code adds the means of the two views: twice this value).

    Weights act as in :class:`~lightning_nrml.losses.SupConLoss`: a sample of weight ``w`` counts ``w`` as an
    anchor and ``w`` in the sums of all others, so 0/1 weights give the loss of the kept images alone.

    Value and gradient are made together, in row panels; memory grows with ``N * D``, not with ``N * N``.
    Under several processes each rank owns its rows and meets the keys of all ranks; the gradient includes
    what the losses of the other ranks send to its rows. All ranks must give equally many rows and take the
    backward pass with the same factor (as DDP and gradient scalers do).

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
    arXiv 2002.05709, eq. 1.

    Args:
        temperature: at least 0.003 (0.5 on CIFAR, 0.1 on ImageNet). Below 0.03 the sums are made in float64.

    Raises:
        ValueError: if ``temperature`` is too small.
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        if not temperature >= MIN_TEMPERATURE:
            raise ValueError(
                f"'temperature' must be at least {MIN_TEMPERATURE}, got {temperature}; 0.05 to 0.5 is usual."
            )
        self.temperature = temperature

    def forward(self, z_a: Tensor, z_b: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of a batch of pairs.

        Args:
            z_a: ``(B, D)`` projections of the first views, of any float type; normalised inside.
            z_b: ``(B, D)`` projections of the second views, in the same order.
            weight: ``(B,)`` weights of the images in [0, 1]; ``None`` = all 1.

        Returns:
            0-d tensor, float32 (float64 for float64 input).

        Raises:
            ValueError: if the shapes do not agree.
        """
        if z_a.ndim != 2 or z_a.shape != z_b.shape:
            raise ValueError(
                "'z_a' and 'z_b' must have the same shape (B, D), "
                f"got {tuple(z_a.shape)} and {tuple(z_b.shape)}."
            )
        if weight is not None:
            if weight.shape != z_a.shape[:1]:
                raise ValueError(
                    f"'weight' must have shape ({len(z_a)},), one per pair, got {tuple(weight.shape)}."
                )
            weight = torch.cat([weight, weight])
        with full_precision(z_a):
            both = torch.cat([z_a, z_b])
            no_label = both.new_zeros(len(both))
            z, w = prepare(both, no_label, weight)
            total: Tensor = _NTXent.apply(unit_rows(z), w, self.temperature)
            return safe_divide(total, distributed.mean_over_ranks(w.sum()))

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"temperature={self.temperature}"


class _NTXent(torch.autograd.Function):
    """Weighted sum of the anchors' losses for own unit rows ``z (2B, D)``: view a above view b.

    With ``E = exp S`` (0 for a row with itself), ``d = E w`` and ``v = 1 / d``, the gradient of the sum over
    all ranks with respect to row i is ``w_i (sum_j E_ij (v_i + v_j) w_j z_j - 2 z_p) / T``. It needs only the
    keys and ``d`` of the other ranks, so the backward pass has no communication.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor, temperature: float) -> Tensor:
        out_type = z.dtype
        if temperature < MIN_TEMPERATURE_FP32:
            z, w = z.double(), w.double()
        keys, key_weight = distributed.gather(z), distributed.gather(w)
        sweep = _Sweep(keys / math.sqrt(temperature), distributed.rank() * len(z), len(z))

        mass = sweep.product(key_weight[:, None])
        partner = z.roll(len(z) // 2, dims=0)
        loss = mass.squeeze(1).log() - (z * partner).sum(dim=1) / temperature
        total = (w * loss).masked_fill(w == 0, 0.0).sum()
        if ctx.needs_input_grad[0]:
            mass = distributed.gather(mass)
            inverse = torch.where(mass > 0, 1.0 / mass, torch.zeros_like(mass)).squeeze(1)
            grad = sweep.product(key_weight[:, None] * keys, inverse)
            grad = grad.sub_(partner, alpha=2.0).mul_(w[:, None] / temperature)
            ctx.save_for_backward(grad.to(out_type))
        return total.to(out_type)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None


class _Sweep:
    """Products with ``E = exp(x_own x^T)``, whose own entries are 0, made panel by panel.

    In one process all rows are own and E is symmetric: each pair is then computed once.
    """

    def __init__(self, x: Tensor, start: int, rows: int) -> None:
        self.x, self.start, self.stop = x, start, start + rows
        self.symmetric = rows == len(x)
        self.block = CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK
        self.kept: Tensor | None = None  # a matrix of one panel is worth keeping for the second product

    def product(self, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """``E @ value``, or ``(E * (bias_i + bias_j)) @ value``: ``(n, C) -> (rows, C)``. ``bias`` ends E."""
        out = torch.zeros_like(value)
        for first, last, left, e in self._panels():
            if bias is not None:
                e.mul_(bias[first:last, None] + bias[left:])
            out[first:last].addmm_(e, value[left:])
            if self.symmetric:
                out[last:].addmm_(e[:, last - left :].T, value[first:last])
        return out[self.start : self.stop]

    def _panels(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """Rows ``first:last`` of E from column ``left`` on."""
        n = len(self.x)
        if self.kept is not None:
            yield self.start, self.stop, 0, self.kept
            return
        first, buffer = self.start, None
        while first < self.stop:
            left = first if self.symmetric else 0
            last = min(first + max(self.block // (n - left), 1), self.stop)
            size = (last - first) * (n - left)
            if buffer is None or buffer.numel() < size:
                buffer = self.x.new_empty(max(size, min(self.block, n * (self.stop - first))))
            e = buffer[:size].view(last - first, n - left)
            torch.matmul(self.x[first:last], self.x[left:].T, out=e)
            e.exp_().diagonal(first - left)[: last - first].zero_()
            if (first, last) == (self.start, self.stop):
                self.kept = e
            yield first, last, left, e
            first = last
