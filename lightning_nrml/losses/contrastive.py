"""Contrastive losses of MCL / XBM as PRISM uses them: within the batch and against a memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_nrml import distributed
from lightning_nrml.losses.base import Loss, full_precision, prepare, safe_divide, unit_rows

# A positive pair this similar is the same image (the official code's rule) and has nothing to learn.
SAME_IMAGE = 1.0 - 1e-5
# Similarities computed at a time: temporaries stay in the cache of a CPU, and at 16 MB on a GPU.
CPU_BLOCK = 2**18
GPU_BLOCK = 2**22


def _check_margin(neg_margin: float) -> None:
    if not -1.0 <= neg_margin <= 1.0:
        raise ValueError(f"'neg_margin' is a cosine and must lie in [-1, 1], got {neg_margin}.")


class ContrastiveLoss(Loss):
    """Contrastive loss over all ordered pairs of the (gathered) batch.

    With cosines ``s``: ``(sum over positive pairs with s < 1 - 1e-5 of (1 - s) + sum over negative pairs
    with s > neg_margin of s) / n``. A sample is never paired with itself.

    With weights, a pair counts ``w_i * w_j`` and ``n`` is the sum of the weights, so 0/1 weights give the
    loss of the kept samples alone. With pair weights, which pairwise filters give, a pair counts that much
    more or less; ``n`` stays.

    Source: MCL of Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, as used by PRISM,
    Liu et al., CVPR 2021 (official code; the paper prints other constants with the same gradients).

    Args:
        neg_margin: cosine above which a negative pair is pushed apart, in [-1, 1].

    Raises:
        ValueError: if ``neg_margin`` is not a cosine.
    """

    takes_pairs: ClassVar[bool] = True

    def __init__(self, neg_margin: float = 0.5) -> None:
        super().__init__()
        _check_margin(neg_margin)
        self.neg_margin = neg_margin

    def forward(
        self,
        embedding: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        pair_weight: Tensor | None = None,
    ) -> Tensor:
        """See :class:`~lightning_nrml.losses.base.Loss`.

        Args:
            embedding, label, weight: as in every loss.
            pair_weight: ``(B, M)`` weights in [0, 1] of the pairs with the M rows of the gathered batch.

        Raises:
            ValueError: if the shapes do not agree.
        """
        with full_precision(embedding):
            z, w = prepare(embedding, label, weight)
            pair = self._pairs(unit_rows(z), label)
            if pair_weight is not None:
                if pair_weight.shape != pair.shape:
                    raise ValueError(
                        f"'pair_weight' must be {tuple(pair.shape)}, this rank's rows against the gathered "
                        f"batch, got {tuple(pair_weight.shape)}."
                    )
                pair = pair * pair_weight.detach().to(pair)
            key_weight = distributed.gather(w)
            total = (w[:, None] * key_weight[None, :] * pair).sum()
            return safe_divide(total, key_weight.sum() / distributed.world_size())

    def _pairs(self, z: Tensor, label: Tensor) -> Tensor:
        """``(B, M)`` terms of the unit rows ``z`` against the gathered batch."""
        keys = distributed.gather(z, grad=True)
        key_label = distributed.gather(label)
        s = z @ keys.T
        same = label[:, None] == key_label[None, :]
        # By position and not only by similarity: TF32 products of a row with itself are off by 1e-3.
        own = torch.arange(len(z), device=z.device) + distributed.rank() * len(z)
        other = torch.ones_like(same).scatter_(1, own[:, None], False)
        positive = same & other & (s < SAME_IMAGE)
        negative = ~same & (s > self.neg_margin)
        return (1.0 - s) * positive + s * negative

    @torch.no_grad()
    def per_sample(self, embedding: Tensor, label: Tensor) -> Tensor:
        """``(B,)`` sums over the pairs of each row, see :meth:`Loss.per_sample`; none with broken rows."""
        with full_precision(embedding):
            finite = torch.isfinite(embedding).all(dim=1)
            z, w = prepare(embedding, label, finite)
            loss = (self._pairs(unit_rows(z), label) * distributed.gather(w)).sum(dim=1)
            return loss.float().masked_fill(~finite, torch.nan)


class CrossBatchContrastiveLoss(torch.nn.Module):
    """The same sums over batch rows x memory rows, divided by the whole batch size (dropped rows included).

    The memory carries no gradient. Value and gradient are computed together, block by block, so the memory
    needed does not grow with the queue. Only similarity tells that a memory row is the anchor's own image.

    Source: XBM, Wang et al., CVPR 2020, with the normaliser of PRISM's official code.

    Args:
        neg_margin: cosine above which a negative pair is pushed apart, in [-1, 1].

    Raises:
        ValueError: if ``neg_margin`` is not a cosine.
    """

    def __init__(self, neg_margin: float = 0.5) -> None:
        super().__init__()
        _check_margin(neg_margin)
        self.neg_margin = neg_margin

    def forward(
        self,
        embedding: Tensor,
        label: Tensor,
        memory_embedding: Tensor,
        memory_label: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch against a memory.

        Args:
            embedding: ``(B, D)`` of any float type, this rank's rows.
            label: ``(B,)`` int64 given labels.
            memory_embedding: ``(M, D)``, equal on all ranks; ``M = 0`` gives 0.
            memory_label: ``(M,)`` int64.
            weight: ``(B,)`` weights of the anchors in [0, 1]; ``None`` = all 1.

        Returns:
            0-d tensor, float32 (float64 for float64 input).

        Raises:
            ValueError: if the shapes do not agree.
        """
        if memory_embedding.ndim != 2 or memory_embedding.shape[1] != embedding.shape[1]:
            raise ValueError(
                f"'memory_embedding' must be (M, {embedding.shape[1]}) like 'embedding', "
                f"got shape {tuple(memory_embedding.shape)}."
            )
        if memory_label.shape != memory_embedding.shape[:1]:
            raise ValueError(
                f"'memory_label' must have shape ({len(memory_embedding)},), got {tuple(memory_label.shape)}."
            )
        with full_precision(embedding):
            z, w = prepare(embedding, label, weight)
            z = unit_rows(z)
            keys = unit_rows(memory_embedding.detach().to(z))
            total: Tensor = _PairSum.apply(z, w, label, keys, memory_label, self.neg_margin)
            return total / max(len(z), 1)


class _PairSum(torch.autograd.Function):
    """Weighted pair sum of anchors against constant keys, with the gradient made in the same sweep."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, w: Tensor, label: Tensor, keys: Tensor, key_label: Tensor, margin: float
    ) -> Tensor:
        total = z.new_zeros(())
        grad = torch.zeros_like(z)
        block = max((CPU_BLOCK if z.device.type == "cpu" else GPU_BLOCK) // max(len(z), 1), 1)
        for start in range(0, len(keys), block):
            k = keys[start : start + block]
            s = z @ k.T
            # The loss is linear in s: slope +1 for active negatives, -1 for active positives (which also
            # add 1). Signs of clipped differences are several times faster on a CPU than comparisons.
            push = (s - margin).clamp_(min=0.0).sign_()
            pull = (s - SAME_IMAGE).clamp_(max=0.0).sign_()
            same = label[:, None] == key_label[None, start : start + block]
            slope = torch.where(same, pull, push).mul_(w[:, None])
            grad += slope @ k
            total += s.mul_(slope).sum() - slope.clamp_(max=0.0).sum()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None, None, None, None
