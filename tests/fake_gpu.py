"""A GPU that computes nothing: CUDA code paths run on any machine, and what a real one refuses is refused.

CPU tensors are real; CUDA tensors have shape, type and device only (``FakeTensorMode``). An operation on
tensors of two devices raises, as does everything that makes the host wait for the device: reading a value,
results whose shape depends on values (``nonzero``, boolean masks), and blocking copies between the devices.
There is no backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class WaitsForDevice(AssertionError):
    """The code under test would make the host wait for the GPU."""


@contextmanager
def fake_gpu() -> Iterator[None]:
    """In this block ``device="cuda"`` is a GPU that computes nothing, and waiting for it raises."""
    with FakeTensorMode(allow_non_fake_inputs=True), _NoWait():
        yield


class _NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_gpu = any(isinstance(x, FakeTensor) for x in leaves)
        if not on_gpu and not any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            _check_copy(func.overloadpacket is torch.ops.aten.copy_, args, kwargs)
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise WaitsForDevice(f"{func} reads values of the GPU") from error


def _check_copy(in_place: bool, args: Any, kwargs: Any) -> None:
    source = args[1] if in_place else args[0]
    target = args[0].device if in_place else torch.device(kwargs.get("device") or source.device)
    non_blocking = kwargs.get("non_blocking", in_place and len(args) > 2 and args[2])
    if source.device.type != target.type and not non_blocking:
        raise WaitsForDevice(f"a blocking copy from {source.device} to {target}: use full(), or non_blocking")
