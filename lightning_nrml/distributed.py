"""The only file that talks to ``torch.distributed``. Every function is a no-op in one process.

Convention for losses: the loss on a rank is the *mean over its own anchors* against gathered keys, so
that DDP's mean of gradients equals the gradient of one process on the concatenated batch. Weighted
means divide by ``mean_over_ranks(weight.sum())``, never by the local sum.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def is_initialized() -> bool:
    """True inside an initialised process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes (1 without a process group)."""
    return dist.get_world_size() if is_initialized() else 1


def rank() -> int:
    """Rank of this process (0 without a process group)."""
    return dist.get_rank() if is_initialized() else 0


def gather_sizes(length: int, device: torch.device) -> list[int]:
    """Row counts of all ranks, in rank order."""
    if not is_initialized():
        return [length]
    mine = torch.full((1,), length, dtype=torch.int64, device=device)
    sizes = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(sizes, mine)
    counts: list[int] = torch.cat(sizes).tolist()  # at once: the host waits for a GPU here
    return counts


def own_rows(sizes: list[int]) -> slice:
    """Where this rank's rows lie in a tensor gathered from ranks with these row counts."""
    start = sum(sizes[: rank()])
    return slice(start, start + sizes[rank()])


def gather(x: Tensor, *, grad: bool = False, sizes: list[int] | None = None) -> Tensor:
    """Concatenate the rows of all ranks in rank order: ``(B_r, ...) -> (sum B_r, ...)``.

    Args:
        x: rows of this rank; all ranks must agree on everything but the first dimension.
        grad: keep the graph, so that a rank's rows receive gradient from the losses of all ranks.
        sizes: row counts from :func:`gather_sizes` if they may differ; ``None`` means that they are
            equal (gloo aborts the whole process otherwise).
    """
    if not is_initialized():
        return x if grad else x.detach()
    ragged = sizes is not None and len(set(sizes)) > 1
    if ragged:
        assert sizes is not None
        pad = x.new_zeros((max(sizes) - x.shape[0], *x.shape[1:]))
        x = torch.cat([x, pad])
    gathered: Tensor = _Gather.apply(x) if grad else _all_gather(x.detach())
    if ragged:
        assert sizes is not None
        return torch.cat([p[:n] for p, n in zip(gathered.split(max(sizes)), sizes, strict=True)])
    return gathered


def _all_gather(x: Tensor) -> Tensor:
    as_bytes = (x.to(torch.uint8) if x.dtype is torch.bool else x).contiguous()
    parts = [torch.empty_like(as_bytes) for _ in range(world_size())]
    dist.all_gather(parts, as_bytes)
    whole = torch.cat(parts)
    return whole.bool() if x.dtype is torch.bool else whole


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums each row's gradient over the losses of all ranks.

    Torch's own ``torch.distributed.nn.functional.all_gather`` does the same, but warns that it is
    deprecated since its successor, ``all_gather_single``, appeared; torch 2.6 does not have that one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        return _all_gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        grad = grad_output.contiguous().clone()
        dist.all_reduce(grad)
        start = rank() * ctx.num_rows
        return grad[start : start + ctx.num_rows]


def gather_ragged(x: Tensor, *, grad: bool = False) -> tuple[Tensor, list[int]]:
    """:func:`gather` for ranks with unequal row counts; also returns the counts."""
    sizes = gather_sizes(x.shape[0], x.device)
    return gather(x, grad=grad, sizes=sizes), sizes


def reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    x = x.detach()
    if is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def reduce_max(x: Tensor) -> Tensor:
    """Maximum over ranks, entry by entry, without gradient."""
    x = x.detach()
    if is_initialized():
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean over ranks, without gradient: the denominator of a weighted mean."""
    return reduce_sum(x) / world_size()


def broadcast(obj: T, source: int = 0) -> T:
    """Rank ``source``'s picklable object, on every rank."""
    if not is_initialized():
        return obj
    box: list[Any] = [obj]
    dist.broadcast_object_list(box, src=source)
    result: T = box[0]
    return result


def barrier() -> None:
    """Wait for all ranks."""
    if is_initialized():
        dist.barrier()


def exempt_from_ddp_sync(module: nn.Module) -> None:
    """Tell DDP not to broadcast the buffers of memories, ledgers and filters before each forward.

    They are written from gathered tensors and so are equal on all ranks already; for a large memory
    the broadcast costs more than the step. Parts opt in with the class attribute
    ``equal_on_all_ranks = True``. Call before the DDP wrap (``setup`` hooks are early enough).
    """
    names = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for prefix, part in module.named_modules():
        if getattr(part, "equal_on_all_ranks", False):
            names |= {f"{prefix}.{name}" if prefix else name for name, _ in part.named_buffers()}
    module._ddp_params_and_buffers_to_ignore = sorted(names)  # type: ignore[assignment]
