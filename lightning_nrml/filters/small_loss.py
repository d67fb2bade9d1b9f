"""Small-loss selection: what the net finds hard to fit is taken to be wrong."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.cut import SmoothedCut, check_rate
from lightning_nrml.types import FilterContext, Selection


class LossQuantile(NoiseFilter):
    """Drops the rows whose loss is above a quantile of the losses, averaged over the last batches.

    The quantile of a batch is the loss that a share ``noise_rate`` of its rows reaches or passes. A net
    learns the right labels first (Arpit et al., "A Closer Look at Memorization in Deep Networks", ICML 2017,
    arXiv 1706.05394), so early large losses point at wrong ones; a net that has learned the wrong ones by
    heart shows none.

    The loss is that of the module (``ctx.per_sample_loss``). The score is ``-loss``: for cross-entropy the
    log-posterior of the given label, else only a rank. A row without a finite loss or embedding is dropped
    and counts nowhere.

    Args:
        noise_rate: assumed share of wrong labels, in [0, 1).
        window: batches over which the quantile is averaged; 1 = this batch alone, and the number of dropped
            rows is then exactly ``int(noise_rate * n)``.

    Raises:
        ValueError: for an argument outside its range.
    """

    granularities: ClassVar[tuple[str, ...]] = ("batch",)
    requires: tuple[str, ...] = ("per_sample_loss",)

    def __init__(self, noise_rate: float = 0.5, window: int = 30) -> None:
        super().__init__()
        check_rate(noise_rate)
        self.noise_rate = noise_rate
        self.cut = SmoothedCut(window)

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` float32, minus the loss; NaN where loss or embedding are not finite."""
        loss = ctx.per_sample_loss
        if loss is None or loss.shape != ctx.label.shape:
            shape = None if loss is None else tuple(loss.shape)
            raise ValueError(
                f"{type(self).__name__} needs per_sample_loss (B,), one value per sample, got {shape}; use a "
                "loss that has one, such as CosineSoftmaxLoss."
            )
        finite = loss.isfinite() & ctx.embedding.isfinite().all(dim=1)
        return (-loss.float()).masked_fill(~finite, torch.nan)

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch; ``threshold`` is minus the loss from which on rows are dropped.

        ``stats``: ``nonfinite`` ``(B,)`` bool.
        """
        score = self.score(ctx)
        finite = ~score.isnan()
        drop, cut = self.cut.push(score, self.noise_rate)
        return Selection((finite & ~drop).float(), score, cut, {"nonfinite": ~finite})

    def extra_repr(self) -> str:
        return f"noise_rate={self.noise_rate}"


class SmallLoss(LossQuantile):
    """Keeps the ``1 - noise_rate`` of each batch that has the smallest loss.

    The selection of co-teaching with one net: Han et al., "Co-teaching: Robust Training of Deep Neural
    Networks with Extremely Noisy Labels", NeurIPS 2018, arXiv 1804.06872, algorithm 1. There the rate rises
    linearly over the first 10 epochs; the callback's ``ramp_epochs`` does that.

    Args:
        noise_rate: share of each batch to drop, in [0, 1).

    Raises:
        ValueError: if ``noise_rate`` is out of range.
    """

    def __init__(self, noise_rate: float = 0.5) -> None:
        super().__init__(noise_rate, window=1)
