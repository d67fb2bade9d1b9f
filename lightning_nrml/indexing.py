"""Writing into per-sample tables by dataset index."""

from __future__ import annotations

import torch
from torch import Tensor


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
