"""Erasing attention consistency: class attention of an image and of its mirror image must agree."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.losses.base import full_precision, safe_divide, widen


class EACLoss(nn.Module):
    """Cross-entropy on the image, plus the squared difference of two class attention maps.

    With feature maps ``F`` of the image and ``F'`` of its mirror image (each erased at random on its own)
    and the classifier's weight ``W``, which gets no gradient from this term:

        M[i, l]  = sum_d W[l, d] F[i, d]            (no bias, no ReLU, no normalisation)
        L_att    = mean over i, l, h, w of (M - mirror(M'))^2
        L        = CE(logits of the image, label) + lam L_att

    All classes count in ``L_att``, not only the given one. The mirror image is never pulled to the given
    label, so a wrong label cannot be memorised through a detail that erasing or mirroring takes away.
    ``lam`` belongs to the scale of the features, because the maps are not normalised: a small net that
    starts at random has larger ones than a pretrained ResNet, and 5 keeps it from learning at all.

    Source: Zhang et al., "Learn From All: Erasing Attention Consistency for Noisy Label Facial Expression
    Recognition", ECCV 2022, arXiv 2207.10299.

    Args:
        lam: weight of the consistency, at least 0; 5 in the paper (ResNet-50, 7 x 7 maps).

    Raises:
        ValueError: ``lam`` is negative.
    """

    def __init__(self, lam: float = 5.0) -> None:
        super().__init__()
        if lam < 0:
            raise ValueError(f"lam is {lam}: the weight of the consistency must not be negative.")
        self.lam = lam

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        maps: Tensor,
        mirrored: Tensor,
        class_weight: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: ``(B, L)`` of the image itself.
            label: ``(B,)`` int64 given labels.
            maps: ``(B, D, h, w)`` features of the image before pooling.
            mirrored: the same of the mirror image, as the net gave them (not mirrored back).
            class_weight: ``(L, D)`` of the classifier.
            weight: ``(B,)`` sample weights in [0, 1]; a row of weight 0 takes part in neither term.

        Returns:
            0-d tensor, float32 (float64 for float64 input).
        """
        return self.terms(logits, label, maps, mirrored, class_weight, weight)[0]

    def terms(
        self,
        logits: Tensor,
        label: Tensor,
        maps: Tensor,
        mirrored: Tensor,
        class_weight: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, its cross-entropy and its ``L_att`` without ``lam``; arguments as in :meth:`forward`."""
        if maps.shape != mirrored.shape or maps.ndim != 4 or maps.shape[1] != class_weight.shape[1]:
            raise ValueError(
                f"maps and mirrored must both be (B, {class_weight.shape[1]}, h, w) for a classifier on "
                f"{class_weight.shape[1]} features, got {tuple(maps.shape)} and {tuple(mirrored.shape)}."
            )
        with full_precision(logits):
            w = logits.new_ones(len(logits)) if weight is None else weight.detach().to(logits.device)
            w = widen(w)
            kept = w > 0
            w = w.masked_fill(~kept, 0.0)
            entropy = F.cross_entropy(
                widen(logits).masked_fill(~kept[:, None], 0.0),
                label.masked_fill(~kept, 0),
                reduction="none",
            )
            first = attention_maps(maps, class_weight, kept)
            second = attention_maps(mirrored, class_weight, kept).flip(3)
            differ = (first - second).square().mean(dim=(1, 2, 3))
            total = distributed.mean_over_ranks(w.sum())
            entropy, attention = (safe_divide((w * x).sum(), total) for x in (entropy, differ))
            return entropy + self.lam * attention, entropy, attention

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"lam={self.lam}"


def attention_maps(maps: Tensor, class_weight: Tensor, kept: Tensor | None = None) -> Tensor:
    """``(B, L, h, w)`` class attention maps of features ``(B, D, h, w)``; no gradient to ``class_weight``.

    Rows outside ``kept (B,)`` give 0 and pass no gradient back.
    """
    rows = widen(maps)
    if kept is not None:
        rows = rows.masked_fill(~kept[:, None, None, None], 0.0)
    return torch.einsum("bdhw,ld->blhw", rows, class_weight.detach().to(rows.dtype))
