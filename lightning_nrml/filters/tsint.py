"""T-SINT: choose the pairs of the batch that take part in the loss, by a teacher's distances."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.cut import check_rate
from lightning_nrml.precision import exact_products
from lightning_nrml.types import FilterContext, Selection


def right_positives(noise_rate: float, num_classes: int) -> float:
    """Share of the pairs of equal given label that truly are of one class.

    ``(1 - e)^2 + e^2 / (C - 1)``: exact for balanced classes and symmetric noise of rate ``e``.

    Args:
        noise_rate: ``e`` in [0, 1].
        num_classes: ``C``; a single class has no wrong pairs.
    """
    if num_classes < 2:
        return 1.0
    return (1 - noise_rate) ** 2 + noise_rate**2 / (num_classes - 1)


def wrong_negatives(noise_rate: float, num_classes: int) -> float:
    """Share of the pairs of different given labels that truly are of one class.

    ``2 e (1 - e) / (C - 1) + (C - 2) e^2 / (C - 1)^2``, under the conditions of :func:`right_positives`.
    """
    if num_classes < 2:
        return 0.0
    others = num_classes - 1
    return 2 * noise_rate * (1 - noise_rate) / others + (num_classes - 2) * noise_rate**2 / others**2


class TSINT(NoiseFilter):
    """Teacher-based Selection of INTeractions: pairs, not samples, are left out of the loss.

    A mislabelled image is a wrong positive for its given class, but still a right negative for most others.
    So of the pairs of a batch those are kept on which a teacher agrees: with its distances ``D`` between unit
    rows, a positive pair (equal given labels) if ``D <= C+``, a negative one if ``D >= C-``. The cuts are
    running means ``C := momentum C + (1 - momentum) c`` of the batch's quantiles ``c+`` and ``c-``; the first
    batch sets them. Each unordered pair counts once, and none of a row with itself. A batch without positive
    (or negative) pairs leaves that cut alone.

    Ibrahimi et al., "Learning with Label Noise for Image Retrieval by Selecting Interactions", WACV 2022,
    arXiv 2112.10453. Of the method only its outline was available to us: quantiles, distances and means are
    our reading. It needs ``ctx.teacher``, which the callback of the same name provides, and a loss that
    takes pair weights (:class:`~lightning_nrml.losses.ContrastiveLoss`).

    The sample weight is 1 for all finite rows. The score, for ledger and audit, is the log of the smoothed
    share of a sample's positive pairs that are kept; NaN for a sample without any.

    Args:
        num_classes: number of classes, for the default shares.
        noise_rate: assumed share of wrong labels, in [0, 1), for the default shares.
        keep_positive: share ``q+`` of the positive pairs to keep, in [0, 1]; ``None`` = the expected share
            of right ones, :func:`right_positives`.
        drop_negative: share ``q-`` of the negative pairs to drop, in [0, 1]; ``None`` = the expected share
            of wrong ones, :func:`wrong_negatives`.
        momentum: of the cuts, in [0, 1); 0 = each batch's own.

    Attributes:
        cuts: ``(2,)`` float32 buffer, ``C+`` and ``C-``; NaN = none yet.

    Raises:
        ValueError: for an argument outside its range.
    """

    granularities: ClassVar[tuple[str, ...]] = ("batch",)
    requires: tuple[str, ...] = ("teacher",)
    cuts: Tensor

    def __init__(
        self,
        num_classes: int,
        noise_rate: float = 0.5,
        keep_positive: float | None = None,
        drop_negative: float | None = None,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        check_rate(noise_rate)
        for name, value in (("keep_positive", keep_positive), ("drop_negative", drop_negative)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1], got {value}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}.")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        self.num_classes = num_classes
        self.noise_rate = noise_rate
        self.keep_positive = keep_positive
        self.drop_negative = drop_negative
        self.momentum = momentum
        self.register_buffer("cuts", torch.full((2,), torch.nan, dtype=torch.float32))

    @property
    def shares(self) -> tuple[float, float]:
        """``q+`` and ``q-`` in use."""
        keep, drop = self.keep_positive, self.drop_negative
        return (
            right_positives(self.noise_rate, self.num_classes) if keep is None else keep,
            wrong_negatives(self.noise_rate, self.num_classes) if drop is None else drop,
        )

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` log of the smoothed share of positive pairs within the present cut; NaN without any."""
        distance, positive, _ = self._pairs(ctx)
        return _row_score(positive, positive & ~(distance > self.cuts[0]))

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on the pairs of one global batch and move the cuts.

        Returns:
            ``pair_weight`` ``(B, B)`` 0/1, symmetric, 1 on the diagonal; weight, score ``(B,)``;
            ``threshold`` is minus ``C+``, so that higher means stricter as for other filters. ``stats``:
            ``cut_positive``, ``cut_negative``, ``keep_positive`` and ``keep_negative`` (kept shares), 0-d;
            ``nonfinite`` ``(B,)`` bool.
        """
        distance, positive, negative = self._pairs(ctx)
        shares = self.shares
        upper = torch.ones_like(positive).triu(1)
        new = torch.stack(
            [quantile(distance, x & upper, q) for x, q in zip((positive, negative), shares, strict=True)]
        )
        # lerp is exact at both ends: equal batches leave the cuts as they are, momentum 0 takes the new ones
        running = torch.where(self.cuts.isnan(), new, self.cuts.lerp(new, 1 - self.momentum))
        self.cuts.copy_(torch.where(new.isnan(), self.cuts, running))
        # NaN compares false: without a cut nothing is dropped
        wrong_positive = positive & (distance > self.cuts[0])
        wrong_negative = negative & (distance < self.cuts[1])
        finite = ctx.embedding.isfinite().all(dim=1)
        stats = {
            "cut_positive": self.cuts[0].clone(),
            "cut_negative": self.cuts[1].clone(),
            "keep_positive": 1 - wrong_positive.sum() / positive.sum(),
            "keep_negative": 1 - wrong_negative.sum() / negative.sum(),
            "nonfinite": ~finite,
        }
        return Selection(
            weight=finite.float(),
            score=_row_score(positive, positive & ~wrong_positive),
            threshold=-self.cuts[0],
            stats=stats,
            pair_weight=1 - (wrong_positive | wrong_negative).float(),
        )

    def _pairs(self, ctx: FilterContext) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher distances ``(B, B)``, and which pairs are positive and negative; no broken rows."""
        if ctx.teacher is None or ctx.teacher.ndim != 2 or len(ctx.teacher) != len(ctx):
            shape = None if ctx.teacher is None else tuple(ctx.teacher.shape)
            raise ValueError(f"TSINT needs teacher embeddings (B, D), one row per sample, got {shape}.")
        finite = ctx.teacher.isfinite().all(dim=1) & ctx.embedding.isfinite().all(dim=1)
        rows = normalize(ctx.teacher.float().masked_fill(~finite.unsqueeze(1), 0.0), dim=1)
        with exact_products(rows.device.type):
            half = (2 - 2 * (rows @ rows.T)).clamp_min_(0).sqrt_().triu_(1)
        distance = half + half.T  # exactly symmetric, whatever the product's rounding
        both = finite.unsqueeze(1) & finite & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        same = ctx.label.unsqueeze(1) == ctx.label
        return distance, both & same, both & ~same

    def extra_repr(self) -> str:
        return (
            f"noise_rate={self.noise_rate}, keep_positive={self.keep_positive}, "
            f"drop_negative={self.drop_negative}, momentum={self.momentum}"
        )


def quantile(value: Tensor, mask: Tensor, q: float) -> Tensor:
    """Quantile of the masked values, linear between neighbours; NaN if there are none.

    Of any size (``torch.quantile`` stops at 16 million) and without asking the device for their number.

    Args:
        value: any shape, finite.
        mask: bool of the same shape.
        q: in [0, 1].

    Returns:
        0-d tensor.
    """
    ordered = torch.where(mask, value, torch.nan).flatten().sort().values  # NaN last
    last = mask.sum() - 1
    place = last.double().clamp_min(0) * q
    low = place.floor().long()
    share = (place - low).to(value.dtype)
    if not len(ordered):
        return value.new_full((), torch.nan)
    first, second = ordered.take(low), ordered.take(torch.minimum(low + 1, last.clamp_min(0)))
    return first + share * (second - first)


def _row_score(positive: Tensor, kept: Tensor) -> Tensor:
    """``log((kept + 1/2) / (pairs + 1))`` per row, NaN where a row has no pair."""
    pairs = positive.sum(dim=1)
    score = ((kept.sum(dim=1) + 0.5) / (pairs + 1)).log()
    return score.masked_fill(pairs == 0, torch.nan)
