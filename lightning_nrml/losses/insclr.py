"""The contrastive loss of InsCLR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_nrml import distributed
from lightning_nrml.losses.base import full_precision, prepare, safe_divide, unit_rows

# A positive pair this similar is the same feature (the official code's rule) and has nothing to learn.
SAME_FEATURE = 1.0 - 1e-6
# Similarities computed at a time: temporaries stay in the cache of a CPU, and at 16 MB on a GPU.
CPU_BLOCK = 2**18
GPU_BLOCK = 2**22


class InsCLRLoss(nn.Module):
    """Contrastive loss of rows against a set: the batch itself, or features read from the memory.

    With cosines ``s``, each row of ``x1`` adds ``1 - s`` for each row of ``x2`` of its label with
    ``s < 1 - 1e-6``, and ``s`` (not ``s - margin``) for each row of another label with ``s > margin``; the
    loss is the mean over the rows of ``x1``. Any integer can be a label: a rejected neighbour carries minus
    its anchor's label, and memory negatives a label that no row of the batch has.

    Nothing is gathered here, as the memory may be common to the ranks or each rank's own. For the batch
    term under several processes give ``x2 = distributed.gather(x1, grad=True)`` with labels that no two ranks
    share by accident. In memory mode leave rows with labels <= 0 out of ``x1``, or give them weight 0.

    Value and gradient are made together, block by block of ``x2``.

    Source: Deng et al., "InsCLR: Improving Instance Retrieval with Self-Supervision", AAAI 2022, arXiv
    2112.01390; details as in the authors' code.

    Args:
        margin: cosine above which a negative pair is pushed apart, in [-1, 1].

    Raises:
        ValueError: if ``margin`` is not a cosine.
    """

    def __init__(self, margin: float = 0.4) -> None:
        super().__init__()
        if not -1.0 <= margin <= 1.0:
            raise ValueError(f"'margin' is a cosine and must lie in [-1, 1], got {margin}.")
        self.margin = margin

    def forward(
        self,
        x1: Tensor,
        y1: Tensor,
        x2: Tensor,
        y2: Tensor,
        weight1: Tensor | None = None,
        weight2: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch. A pair counts with the product of its weights.

        Args:
            x1: ``(B, D)`` features of any float type; normalised inside.
            y1: ``(B,)`` int64 labels.
            x2: ``(M, D)`` features that the rows meet, with gradient if they have one; ``M = 0`` gives 0.
            y2: ``(M,)`` int64 labels.
            weight1: ``(B,)`` weights in [0, 1] of the rows of ``x1``; ``None`` = all 1. The mean divides by
                their sum.
            weight2: ``(M,)`` weights in [0, 1] of the rows of ``x2``; ``None`` = all 1.

        Returns:
            0-d tensor, float32 (float64 for float64 ``x1``).

        Raises:
            ValueError: if the shapes do not agree.
        """
        if x2.ndim != 2 or x2.shape[1] != x1.shape[-1]:
            raise ValueError(f"'x2' must be (M, {x1.shape[-1]}) like 'x1', got shape {tuple(x2.shape)}.")
        for name, y, x in (("y1", y1, x1), ("y2", y2, x2)):
            if y.shape != x.shape[:1]:
                raise ValueError(f"'{name}' must have shape ({len(x)},), got {tuple(y.shape)}.")
        with full_precision(x1):
            z1, w1 = prepare(x1, y1, weight1)
            z2, w2 = prepare(x2.to(z1), y2, weight2)
            total: Tensor = _PairSum.apply(unit_rows(z1), y1, w1, unit_rows(z2), y2, w2, self.margin)
            return safe_divide(total, distributed.mean_over_ranks(w1.sum()))

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"margin={self.margin}"


class _PairSum(torch.autograd.Function):
    """Weighted pair sum of unit rows, with both gradients made in the same sweep over the second rows."""

    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, y1: Tensor, w1: Tensor, x2: Tensor, y2: Tensor, w2: Tensor, margin: float
    ) -> Tensor:
        total = x1.new_zeros(())
        grad1 = torch.zeros_like(x1)
        grad2 = torch.zeros_like(x2) if ctx.needs_input_grad[3] else None
        step = max((CPU_BLOCK if x1.device.type == "cpu" else GPU_BLOCK) // max(len(x1), 1), 1)
        for start in range(0, len(x2), step):
            rows = slice(start, start + step)
            s = x1 @ x2[rows].T
            same = y1[:, None] == y2[None, rows]
            pair = w1[:, None] * w2[None, rows]
            # The loss is linear in s: slope -1 for positives, which also add 1, and +1 for negatives.
            pull = pair * (same & (s < SAME_FEATURE))
            slope = (pair * (~same & (s > margin))).sub_(pull)
            total += (slope * s).sum() + pull.sum()
            grad1.addmm_(slope, x2[rows])
            if grad2 is not None:
                torch.mm(slope.T, x1, out=grad2[rows])
        ctx.save_for_backward(grad1, grad2)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad1, grad2 = ctx.saved_tensors
        second = None if grad2 is None else grad2 * grad_output
        return grad1 * grad_output, None, None, second, None, None, None
