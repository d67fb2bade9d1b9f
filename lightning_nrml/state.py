"""The base of everything that remembers: filters, queues, banks, ledgers."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

from torch import Tensor, nn


class StateModule(nn.Module):
    """A module whose buffers are a record rather than weights.

    Casting the model (``.bfloat16()``, ``.half()``, ``precision="bf16-true"``) moves the buffers but
    keeps their dtypes: a running sum or a score in half precision would be wrong for good.

    Attributes:
        equal_on_all_ranks: written from gathered tensors, so that DDP need not broadcast the buffers.
    """

    equal_on_all_ranks: ClassVar[bool] = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype is x.dtype else x.to(y.device)

        return super()._apply(keep_dtype, recurse)
