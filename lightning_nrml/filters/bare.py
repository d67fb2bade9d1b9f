"""BARE: keep the samples whose posterior stands out from the batch's own statistics of that class."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.memory.centers import CenterMemory, label_error
from lightning_nrml.precision import exact_products
from lightning_nrml.types import FilterContext, Selection

_CLAMP = 1e-8


class BARE(NoiseFilter):
    """Batch REweighting: adaptive selection without a noise rate, a clean set or a schedule.

    With posteriors ``p`` ``(B, C)``, and ``mu_c`` and ``sd_c`` the mean and the standard deviation (n - 1) of
    ``p_c`` over *all* rows of the batch, a row of given label ``y`` is kept if
    ``p_y - mu_y >= k * sd_y``. If no row is, the whole batch is kept. Patel & Sastry, "Adaptive Sample
    Selection for Robust Learning under Label Noise", WACV 2023, arXiv 2106.15292 (rule of the official code).

    The batch is the gathered one, so that ranks share the thresholds. Statistics are in float64, so that
    equal posteriors are equal to their mean. A row that is not finite is dropped and counts nowhere; a
    batch of one row has no deviation and is kept.

    Args:
        k: deviations above the mean; 1 in the paper, where it is not tuned. Smaller keeps more.
        posterior: ``"logits"``: softmax of the module's logits (a classifier, or a loss with proxies).
            ``"centers"``, our extension for losses without classes: softmax of the scaled cosines to class
            centres of a memory of kept rows. A class without rows takes no part in it; its samples are
            kept and get no score.
        num_classes, embedding_dim: sizes of the memory (``"centers"`` only).
        memory_size: rows of the memory (``"centers"`` only).
        scale: inverse temperature of the cosines (``"centers"`` only), > 0.

    Attributes:
        bank: the :class:`~lightning_nrml.memory.CenterMemory`, or ``None``.

    Raises:
        ValueError: for an argument outside its range, or sizes missing for ``"centers"``.
    """

    granularities: ClassVar[tuple[str, ...]] = ("batch",)

    def __init__(
        self,
        k: float = 1.0,
        posterior: Literal["logits", "centers"] = "logits",
        num_classes: int | None = None,
        embedding_dim: int | None = None,
        memory_size: int = 8192,
        scale: float = 16.0,
    ) -> None:
        super().__init__()
        if posterior not in ("logits", "centers"):
            raise ValueError(f"posterior must be 'logits' or 'centers', got {posterior!r}.")
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}.")
        self.k = k
        self.posterior = posterior
        self.scale = scale
        self.bank: CenterMemory | None = None
        if posterior == "logits":
            self.requires = ("logits",)
        elif num_classes is None or embedding_dim is None:
            raise ValueError("BARE with posterior='centers' needs num_classes and embedding_dim.")
        else:
            self.bank = CenterMemory(num_classes, embedding_dim, memory_size)

    def _posterior(self, ctx: FilterContext) -> tuple[Tensor, Tensor, Tensor]:
        """``p`` ``(B, C)`` in float64, which rows are finite ``(B,)``, and which have a score ``(B,)``."""
        if self.bank is None:
            if ctx.logits is None or ctx.logits.ndim != 2 or len(ctx.logits) != len(ctx):
                shape = None if ctx.logits is None else tuple(ctx.logits.shape)
                raise ValueError(
                    f"BARE needs logits (B, C) with one row per sample, got {shape}; use a loss with a "
                    "classifier or proxies, or posterior='centers'."
                )
            scores = ctx.logits.double()
            finite = scores.isfinite().all(dim=1) & ctx.embedding.isfinite().all(dim=1)
            known = finite
        else:
            rows, finite, known = self.bank.unit_rows(ctx.embedding, ctx.label)
            direction = torch.nn.functional.normalize(self.bank.centers, dim=1)
            with exact_products(rows.device.type):
                scores = (rows @ direction.T).double() * self.scale
            scores = scores.masked_fill(~self.bank.filled, -torch.inf)
        # with 24 bits to a value, float64 sums of equal values are exact
        p = scores.softmax(dim=1).float().double()
        return p.clamp(_CLAMP, 1 - _CLAMP), finite, known

    def _given(self, table: Tensor, label: Tensor) -> Tensor:
        """``table[i, label[i]]`` ``(B,)``."""
        try:
            return table.gather(1, label.unsqueeze(1)).squeeze(1)
        except RuntimeError:
            if bool(((label < 0) | (label >= table.shape[1])).any()):
                raise label_error(label, table.shape[1]) from None
            raise

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` float32 log-posterior of the given label; NaN where there is none."""
        p, _, known = self._posterior(ctx)
        return self._given(p, ctx.label).log().masked_fill(~known, torch.nan).float()

    @torch.no_grad()
    def suggest(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` class of the highest posterior; -1 if there is none."""
        p, finite, _ = self._posterior(ctx)
        return self._suggestion(p, finite)

    def _suggestion(self, p: Tensor, finite: Tensor) -> Tensor:
        if self.bank is not None:
            finite = finite & self.bank.filled.any()
        return p.argmax(dim=1).masked_fill(~finite, -1)

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch.

        Returns:
            Weights 0/1, scores ``(B,)``, and as ``threshold`` the log of the mean threshold of the rows.
            ``stats``: ``mean``, ``std`` and ``threshold`` ``(C,)`` float32 of the posteriors; ``fallback``
            0-d bool, whether nothing was above its threshold; ``suggested`` ``(B,)`` int64; ``unknown`` and
            ``nonfinite`` ``(B,)`` bool.
        """
        p, finite, known = self._posterior(ctx)
        own = self._given(p, ctx.label)
        counted = known if self.bank is None else finite & self.bank.filled.any()
        n = counted.sum()
        table = torch.where(counted.unsqueeze(1), p, 0.0)
        mean = table.sum(dim=0) / n
        deviation = torch.where(counted.unsqueeze(1), p - mean, 0.0)
        std = ((deviation**2).sum(dim=0) / (n - 1)).sqrt()  # n = 1: 0 / 0 = NaN, which nothing passes
        threshold = mean + self.k * std
        passed = known & (own - mean[ctx.label] >= self.k * std[ctx.label])
        fallback = ~passed.any()
        keep = torch.where(fallback, finite, passed | (finite & ~known))
        per_row = threshold[ctx.label].masked_fill(~known, torch.nan)
        stats = {
            "mean": mean.float(),
            "std": std.float(),
            "threshold": threshold.float(),
            "fallback": fallback,
            "suggested": self._suggestion(p, finite),
            "unknown": finite & ~known,
            "nonfinite": ~finite,
        }
        score = own.log().masked_fill(~known, torch.nan)
        return Selection(keep.float(), score.float(), per_row.nanmean().log().float(), stats)

    @torch.no_grad()
    def update(self, ctx: FilterContext, selection: Selection) -> None:
        """Write the kept, finite rows into the memory, if there is one."""
        if self.bank is not None:
            rows, finite, _ = self.bank.unit_rows(ctx.embedding, ctx.label)
            self.bank.remember(rows, ctx.label, selection.keep.to(rows.device) & finite)

    def extra_repr(self) -> str:
        return f"k={self.k}, posterior={self.posterior!r}"
