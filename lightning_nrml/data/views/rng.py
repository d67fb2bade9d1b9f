"""Counter-based random numbers: a hash of (seed, epoch, batch, row, stream), without any state.

A draw depends only on *which* sample of *which* global batch it is for, so augmentation does not change
with the number of ranks, the number of workers, a resume, the device, or whatever else consumed the
global generators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_COLUMN = 0xD1342543DE82EF95
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class ViewKey:
    """Names the random numbers of one batch on one rank.

    Args:
        seed: the run's augmentation seed, equal on all ranks.
        epoch: epoch, from 0.
        batch: index of the *global* batch in the epoch, from 0.
        row0: position of this rank's first row in the global batch (``rank * batch_size``).
    """

    seed: int
    epoch: int = 0
    batch: int = 0
    row0: int = 0

    def shift(self, rows: int) -> ViewKey:
        """The key of the part of the batch that starts ``rows`` rows later."""
        return replace(self, row0=self.row0 + rows)


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as the int64 that torch can hold."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014, fig. 16) in wrapping int64."""
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_A)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_B)
    return z ^ _shift_right(z, 31)


def _mix_int(z: int) -> int:
    """The same on one Python integer."""
    z = ((z ^ (z >> 30)) * _MIX_A) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_B) & _MASK
    return z ^ (z >> 31)


def counter_uniform(
    key: ViewKey, rows: int, stream: int, n: int, device: torch.device | str | None = None, *, first: int = 0
) -> Tensor:
    """Uniform numbers for ``rows`` consecutive samples.

    Args:
        key: which batch, and where its first row lies.
        rows: number of rows B.
        stream: which purpose the numbers serve; different streams are independent.
        n: numbers per row.
        device: where to compute (CPU if ``None``); the values are the same everywhere.
        first: skip this many numbers of the stream.

    Returns:
        ``(B, n)`` float32 in [0, 1), multiples of 2^-24.
    """
    state = 0
    for part in (key.seed, key.epoch, key.batch, stream):
        state = _mix_int((state + (part & _MASK) * _GOLDEN + _GOLDEN) & _MASK)
    row = torch.arange(key.row0, key.row0 + rows, dtype=torch.int64, device=device)
    column = torch.arange(first, first + n, dtype=torch.int64, device=device)
    z = _mix(row * _signed(_GOLDEN) + _signed(state))
    z = _mix(z[:, None] + (column + 1) * _signed(_COLUMN))
    return _shift_right(z, 40).to(torch.float32) * 2.0**-24


def row_hash(key: Tensor, seed: int, stream: int = 0) -> Tensor:
    """A number for each row that depends on nothing but its key: where a sample must not depend on order.

    Args:
        key: ``(n,)`` integers, such as dataset positions.
        seed: another seed gives other numbers.
        stream: which purpose the numbers serve; different streams are independent.

    Returns:
        ``(n,)`` int64, different for different keys.
    """
    state = 0
    for part in (seed, stream):
        state = _mix_int((state + (part & _MASK) * _GOLDEN + _GOLDEN) & _MASK)
    return _mix(key.long() * _signed(_GOLDEN) + _signed(state))


class Draws:
    """The random numbers of one operation on one batch, handed out in order.

    Numbers are made on the CPU unless a device is named: the few parameters per sample are then known
    without waiting for the accelerator, and their arithmetic is the same on every device.

    Args:
        key: names the batch.
        rows: number of rows B.
        stream: number of the operation (unique over views and operations).
        own_units: ``(B,)`` bool on the CPU, the images whose values are not in [0, 1]; ``None`` = not known,
            the operation looks at what it gets.
    """

    def __init__(self, key: ViewKey, rows: int, stream: int, own_units: Tensor | None = None) -> None:
        self.key = key
        self.rows = rows
        self.stream = stream
        self.own_units = own_units
        self._used = 0

    def uniform(self, n: int, device: torch.device | None = None) -> Tensor:
        """``(B, n)`` uniform in [0, 1): the next n numbers of every row."""
        draw = counter_uniform(self.key, self.rows, self.stream, n, device, first=self._used)
        self._used += n
        return draw

    def happens(self, p: float) -> Tensor:
        """``(B,)`` bool, True with probability p. Consumes one number whatever p is."""
        return self.uniform(1)[:, 0] < p

    def normal(self, n: int, device: torch.device | None = None) -> Tensor:
        """``(B, n)`` standard normal (Box and Muller 1958); consumes 2n numbers."""
        u = self.uniform(2 * n, device=device)
        radius = torch.sqrt(-2.0 * torch.log1p(-u[:, :n]))
        return radius * torch.cos(2.0 * math.pi * u[:, n:])
