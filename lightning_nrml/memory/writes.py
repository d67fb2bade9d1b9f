"""Small tensor tricks for writing into memories without asking the GPU for a value."""

from __future__ import annotations

from torch import Tensor

from lightning_nrml.indexing import check_index, last_writer

__all__ = ["check_index", "check_rows", "check_size", "check_vector", "last_writer", "wanted_rows"]


def finite_rows(z: Tensor) -> Tensor:
    """``(B,)`` bool, True for rows of ``z (B, D)`` without NaN or infinity.

    The row sum is NaN or infinite exactly when an entry is (or when finite float32 entries add up to
    more than 3e38, which no embedding does), and costs one pass.
    """
    return z.sum(dim=1).isfinite()


def wanted_rows(z: Tensor, keep: Tensor | None) -> Tensor:
    """``(B,)`` bool: rows of ``z (B, D)`` that are finite and of a weight above 0 (``None`` = all)."""
    good = finite_rows(z)
    return good if keep is None else good & (keep.to(good.device) > 0)


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
