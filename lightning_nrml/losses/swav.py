"""SwAV: balanced codes by Sinkhorn-Knopp, and the swapped prediction loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.losses.base import full_precision, prepare, safe_divide, widen

# Iterations between two exponentials. In one iteration a scale vector can move by the number of samples
# times that of prototypes; three stay inside float32 for any batch, and are SwAV's usual number.
STRETCH = 3


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments of samples to equally filled prototypes.

    Starting from ``Q = exp(scores / epsilon)``, each iteration scales the prototypes (columns) to equal
    mass over the samples of all ranks, then each sample (row) to mass 1. So rows sum to 1 exactly and the
    columns of the global batch to ``B_total / K`` nearly (exactly after many iterations).

    The work is done in fp32 in the log domain: the exponential is taken only after the maximum of each
    column and then of each row has been taken off, so nothing overflows and no row or column vanishes,
    whatever the scale of the scores. Ranks may hold different numbers of rows, also none; they exchange
    a maximum and ``iterations`` sums of K values.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
    NeurIPS 2020, arXiv 2006.09882, section 3.1 and appendix A; Cuturi, NeurIPS 2013.

    Args:
        scores: ``(B, K)`` products of unit features with unit prototypes, of any float type, this rank's
            rows.
        epsilon: > 0, smoothness of the codes; 0.05 (0.03 for few samples).
        iterations: at least 1.

    Returns:
        ``(B, K)`` codes in float32 (float64 for float64 scores), without gradient.

    Raises:
        ValueError: if ``scores`` is not a matrix with columns, or a setting is out of range.
    """
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"'scores' must be (B, K) with K >= 1 prototypes, got shape {tuple(scores.shape)}.")
    if not epsilon > 0:
        raise ValueError(f"'epsilon' must be positive, got {epsilon}.")
    if iterations < 1:
        raise ValueError(f"'iterations' must be at least 1, got {iterations}.")
    with full_precision(scores):
        scores = widen(scores)
        log_row = scores.new_zeros(len(scores))  # log of the row scale so far
        while True:
            # The kernel of this stretch has a 1 in each row and a 1 in each column (on some rank).
            kernel = (scores / epsilon).add_(log_row[:, None])
            kernel.sub_(distributed.reduce_max(_column_max(kernel)))
            top = kernel.amax(dim=1)
            kernel.sub_(top[:, None]).exp_()
            row = top.exp()
            for _ in range(min(iterations, STRETCH)):
                column = 1.0 / distributed.reduce_sum(kernel.T @ row)
                row = 1.0 / (kernel @ column)
            iterations -= STRETCH
            if iterations <= 0:
                return kernel.mul_(column).mul_(row[:, None])
            log_row += row.log() - top


def _column_max(x: Tensor) -> Tensor:
    """Maxima of the columns; -inf without rows, so that an empty rank takes no part."""
    return x.amax(dim=0) if len(x) > 0 else x.new_full(x.shape[1:], -math.inf)


class SwAVLoss(nn.Module):
    """Cross entropy between the code of one crop and the prediction from each other crop.

    ``1/A sum_i 1/(V-1) sum_{v != i} -mean_b sum_k q_i[b,k] log softmax(scores_v / temperature)[b,k]`` over
    the ``A`` assigned crops ``i`` and all ``V`` crops ``v``. Gradient flows through the scores only. With
    uniform codes and equal scores the loss is ``log K``.

    Source: Caron et al., NeurIPS 2020, arXiv 2006.09882, eq. 2, 3 and 6.

    Args:
        temperature: > 0.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"'temperature' must be positive, got {temperature}.")
        self.temperature = temperature

    def forward(
        self,
        scores: Sequence[Tensor],
        codes: Sequence[Tensor],
        assigned: Sequence[int],
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            scores: for each of at least two crops, the ``(B, K)`` products with the prototypes.
            codes: for each assigned crop, its ``(B, K)`` code (:func:`sinkhorn`).
            assigned: positions in ``scores`` of the crops that the codes belong to.
            weight: ``(B,)`` weights of the images in [0, 1]; ``None`` = all 1.

        Returns:
            0-d tensor, float32 (float64 for float64 scores).

        Raises:
            ValueError: if numbers, positions or shapes do not agree.
        """
        self._check(scores, codes, assigned)
        with full_precision(scores[0]):
            no_label = scores[0].new_zeros(len(scores[0]))
            rows = [prepare(x, no_label, weight) for x in scores]
            code = {i: prepare(q.detach(), no_label, weight)[0] for i, q in zip(assigned, codes, strict=True)}
            w = rows[0][1]
            total = w.new_zeros(())
            for v, (logits, _) in enumerate(rows):
                others = [q for i, q in code.items() if i != v]
                if others:  # all codes of other crops share one softmax of this one
                    target = sum(others[1:], others[0])
                    log_p = F.log_softmax(logits / self.temperature, dim=1)
                    total = total - (w * (target * log_p).sum(dim=1)).sum()
            return safe_divide(total / (len(codes) * (len(rows) - 1)), distributed.mean_over_ranks(w.sum()))

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"temperature={self.temperature}"

    @staticmethod
    def _check(scores: Sequence[Tensor], codes: Sequence[Tensor], assigned: Sequence[int]) -> None:
        if len(scores) < 2:
            raise ValueError(f"'scores' must hold at least two crops, got {len(scores)}.")
        if len(codes) != len(assigned) or not codes:
            raise ValueError(
                f"'codes' and 'assigned' must name the same crops, at least one, got {len(codes)} codes for "
                f"{len(assigned)} positions."
            )
        if len(set(assigned)) < len(assigned) or not set(assigned) <= set(range(len(scores))):
            raise ValueError(
                f"'assigned' must hold different positions from 0 to {len(scores) - 1}, got {list(assigned)}."
            )
        for name, parts in (("scores", scores), ("codes", codes)):
            for i, x in enumerate(parts):
                if x.ndim != 2 or x.shape != scores[0].shape:
                    raise ValueError(
                        f"'{name}[{i}]' must have the shape (B, K) of 'scores[0]', {tuple(scores[0].shape)}, "
                        f"got {tuple(x.shape)}."
                    )
