"""The momentum teacher: a frozen copy of a net that follows it by an exponential moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn

# In these 1 - tau of a difference is rounded away: the teacher would stand still.
_HALF = (torch.bfloat16, torch.float16)


def cosine_tau(step: int, max_steps: int, base: float) -> float:
    """Momentum of the teacher at an optimiser step, rising from ``base`` to 1 along a half cosine.

    ``tau_k = 1 - (1 - base) (cos(pi k / K) + 1) / 2``; exactly ``base`` at k = 0 and 1 at k = K (and after).

    Source: Grill et al., "Bootstrap Your Own Latent" (NeurIPS 2020, arXiv 2006.07733), section 3.2.

    Args:
        step: k, optimiser steps done before this one.
        max_steps: K, optimiser steps of the whole run.
        base: momentum at the start, in [0, 1].

    Raises:
        ValueError: ``base`` outside [0, 1] or ``max_steps`` below 1.
    """
    if not 0 <= base <= 1:
        raise ValueError(f"The teacher's momentum must be in [0, 1], got {base}.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
    return 1 - (1 - base) * (math.cos(math.pi * min(step, max_steps) / max_steps) + 1) / 2


class MomentumTeacher(nn.Module):
    """A frozen copy of ``module`` that :meth:`update` moves towards it.

    All parameters are averaged, scale and offset of batch norm too. Buffers are not: in training mode the
    teacher normalises by the batch it sees and keeps its own running statistics, as the official BYOL and
    MoCo do. It has no gradient, so optimisers and DDP leave it alone; equal starts and equal updates keep
    it equal on all ranks. It is part of the checkpoint.

    It stays in float32 (or float64) when the model is cast to half precision (``precision="bf16-true"``):
    the steps of the average are smaller than what bfloat16 can tell apart. Images in half precision then go
    through it under autocast.

    Args:
        module: the student, copied as it is now.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        self.module.requires_grad_(False)
        self.module._apply(lambda x: x.float() if x.dtype in _HALF else x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_float32(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.dtype in _HALF else y

        return super()._apply(at_least_float32, recurse)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The copy's output, without gradient."""
        half = x.dtype in _HALF
        with torch.autocast(x.device.type, x.dtype) if half else nullcontext():
            out: Tensor = self.module(x)
        return out

    @torch.no_grad()
    def update(self, student: nn.Module, tau: float) -> None:
        """``teacher <- teacher + (1 - tau) (student - teacher)`` for every parameter.

        Args:
            student: the net that was copied, after its optimiser step.
            tau: momentum in [0, 1]; 1 leaves the teacher as it is, 0 makes it equal to the student.

        Raises:
            ValueError: ``tau`` outside [0, 1], or a student with other parameters.
        """
        if not 0 <= tau <= 1:
            raise ValueError(f"The teacher's momentum must be in [0, 1], got {tau}.")
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(student.parameters())
        if [p.shape for p in mine] != [p.shape for p in theirs]:
            raise ValueError(
                "The student's parameters do not match the teacher's: give the net it was copied from."
            )
        theirs = [p.to(own.dtype) for own, p in zip(mine, theirs, strict=True)]
        torch._foreach_lerp_(mine, theirs, 1 - tau)

    @torch.no_grad()
    def reset(self, student: nn.Module) -> None:
        """Equal to the student again, buffers included."""
        self.module.load_state_dict(student.state_dict())
