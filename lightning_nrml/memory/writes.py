"""Small tensor tricks for writing into memories without asking the GPU for a value."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_rows(z: Tensor) -> Tensor:
    """``(B,)`` bool, True for rows of ``z (B, D)`` without NaN or infinity.

    The row sum is NaN or infinite exactly when an entry is (or when finite float32 entries add up to
    more than 3e38, which no embedding does), and costs one pass.
    """
    return z.sum(dim=1).isfinite()


def last_writer(index: Tensor, valid: Tensor) -> Tensor:
    """For each row, the row whose value its slot must end up with: the last valid one of its index.

    Writing ``value[last_writer(...)]`` makes all duplicates of an index write the same value, so that
    the result does not depend on the order in which a device writes them.

    Args:
        index: ``(B,)`` int64 slots, with repeats.
        valid: ``(B,)`` bool; invalid rows lose against any valid row of the same index.

    Returns:
        ``(B,)`` int64 row numbers; where an index has no valid row, an invalid one.
    """
    order_key, order = (2 * index + valid).sort(stable=True)
    return order[torch.searchsorted(order_key, 2 * index + 1, right=True) - 1]


def check_rows(z: Tensor, dim: int, owner: str) -> None:
    """Raise ``ValueError`` unless ``z`` is ``(B, dim)``."""
    if z.ndim != 2 or z.shape[1] != dim:
        raise ValueError(f"{owner} holds rows of {dim} values, but got a tensor of shape {tuple(z.shape)}.")


def check_vector(x: Tensor, rows: int, name: str, owner: str) -> None:
    """Raise ``ValueError`` unless ``x`` is ``(rows,)``."""
    if x.shape != (rows,):
        raise ValueError(f"{owner}: '{name}' must have shape ({rows},), got {tuple(x.shape)}.")


def check_size(value: int, name: str, owner: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: '{name}' must be a whole number of at least 1, got {value!r}.")


def check_index(index: Tensor, rows: int, owner: str) -> None:
    """Raise ``IndexError`` for positions outside ``[0, rows)``.

    Only on the CPU: on a GPU the check would make the host wait, and the write itself asserts.
    """
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= rows:
        bad = low if low < 0 else high
        raise IndexError(
            f"{owner} has {rows} samples, but got dataset index {bad}; give it the size of the training set."
        )
