"""The regression loss of BYOL."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_nrml import distributed
from lightning_nrml.losses.base import full_precision, prepare, safe_divide, unit_rows


class BYOLLoss(nn.Module):
    """Squared distance of unit predictions to unit targets of the other view, both ways.

    The batch mean of ``l(p_a, t_b) + l(p_b, t_a)`` with ``l(p, t) = |p/|p| - t/|t||^2 = 2 - 2 cos(p, t)``:
    0 for perfect predictions, 4 for orthogonal rows, 8 for opposite ones. No gradient reaches the targets.

    Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, arXiv 2006.07733, eq. 2.
    """

    def forward(
        self, p_a: Tensor, p_b: Tensor, t_a: Tensor, t_b: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            p_a: ``(B, D)`` predictions of the online network for the first views, of any float type.
            p_b: ``(B, D)`` predictions for the second views.
            t_a: ``(B, D)`` projections of the target network for the first views.
            t_b: ``(B, D)`` projections for the second views.
            weight: ``(B,)`` weights of the images in [0, 1]; ``None`` = all 1.

        Returns:
            0-d tensor, float32 (float64 for float64 input).

        Raises:
            ValueError: if the shapes do not agree.
        """
        for name, x in (("p_b", p_b), ("t_a", t_a), ("t_b", t_b)):
            if x.shape != p_a.shape:
                raise ValueError(
                    f"'{name}' must have the shape {tuple(p_a.shape)} of 'p_a', got {tuple(x.shape)}."
                )
        with full_precision(p_a):
            no_label = p_a.new_zeros(len(p_a))
            rows = [prepare(x, no_label, weight) for x in (p_a, p_b, t_a.detach(), t_b.detach())]
            unit_a, unit_b, target_a, target_b = (unit_rows(x) for x, _ in rows)
            w = rows[0][1]
            cosine = (unit_a * target_b).sum(dim=1) + (unit_b * target_a).sum(dim=1)
            return safe_divide((w * (4.0 - 2.0 * cosine)).sum(), distributed.mean_over_ranks(w.sum()))
