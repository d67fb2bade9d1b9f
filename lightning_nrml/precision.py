"""Products and new tensors in full precision, whatever the run is set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_CPU = getattr(torch.backends.mkldnn, "matmul", None)
_CUDA = getattr(torch.backends.cuda, "matmul", None)


def exact_products(device_type: str) -> AbstractContextManager[None]:
    """No autocast, TF32 or bfloat16 passes inside: rounded scores make ties and move thresholds.

    Costs next to nothing where all of them are off already.

    Args:
        device_type: ``tensor.device.type`` of the operands.
    """
    if torch.is_autocast_enabled(device_type) or _setting(device_type)[1] not in ("none", "ieee", "highest"):
        return _forced(device_type)
    return nullcontext()


@contextmanager
def float32_default() -> Iterator[None]:
    """New tensors are fp32 inside: ``precision="bf16-true"`` and its like change torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _forced(device_type: str) -> Iterator[None]:
    backend, before = _setting(device_type)
    _set(backend, "highest" if backend is None else "ieee")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        _set(backend, before)


def _setting(device_type: str) -> tuple[Any, str]:
    """The place of the float32 product setting (``None``: the global one of older torch) and its value.

    The global function raises once a user has set a backend's own value, so it is the second choice.
    """
    backend = _CPU if device_type == "cpu" else _CUDA
    value = getattr(backend, "fp32_precision", None)
    return (None, torch.get_float32_matmul_precision()) if value is None else (backend, value)


def _set(backend: Any, value: str) -> None:
    if backend is None:
        torch.set_float32_matmul_precision(value)
    else:
        backend.fp32_precision = value
