"""kNN vote: do the nearest features of earlier batches carry the same label?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.cut import SmoothedCut, check_rate, share_cut
from lightning_nrml.memory import FeatureQueue
from lightning_nrml.memory.centers import label_error
from lightning_nrml.precision import exact_products
from lightning_nrml.types import FilterContext, Selection

# Similarities computed at a time when a whole training set is scored: 64 MB.
_BLOCK = 2**24


class KNNVote(NoiseFilter):
    """Judges a label by the share of the nearest memory rows that carry it.

    The memory holds the unit features of kept rows of earlier batches. With ``v`` of the ``k`` nearest ones
    (by cosine) carrying the given label, ``log P_clean = log((v + smoothing / C) / (k + smoothing))``. Rows
    of the same sample, known by its dataset index, do not vote. After Bahri et al., "Deep k-NN for Noisy
    Labels", ICML 2020, arXiv 2004.12289, which filters once, by a plain vote.

    Rows are dropped by a fixed ``threshold`` on ``P_clean``, or so that a share ``noise_rate`` goes: the
    quantile of the batch is averaged over the last ``window`` batches, and rows tied with it go together,
    whichever way brings the number closer to the share.

    A row for which there are no ``k`` voters yet is kept and gets no score; one that is not finite is
    dropped and never remembered.

    Args:
        num_classes: number of classes ``C``.
        embedding_dim: embedding size.
        k: voters per row, at least 1.
        noise_rate: assumed share of wrong labels, in [0, 1); used unless ``threshold`` is given.
        threshold: keep rows of ``P_clean`` above this value in (0, 1); ``None`` = by ``noise_rate``.
        memory_size: rows of the memory, at least ``k``.
        window: batches over which the quantile is averaged.
        warmup_steps: number of :meth:`update` calls during which everything is kept.
        smoothing: votes that are spread over all classes beforehand, > 0.

    Attributes:
        queue: :class:`~lightning_nrml.memory.FeatureQueue`, the memory. steps: 0-d int64, updates so far.

    Raises:
        ValueError: for an argument outside its range.
    """

    granularities: ClassVar[tuple[str, ...]] = ("batch", "epoch")
    steps: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        k: int = 20,
        noise_rate: float = 0.5,
        threshold: float | None = None,
        memory_size: int = 8192,
        window: int = 30,
        warmup_steps: int = 0,
        smoothing: float = 1.0,
    ) -> None:
        super().__init__()
        check_rate(noise_rate)
        least = {"num_classes": (num_classes, 1), "k": (k, 1), "warmup_steps": (warmup_steps, 0)}
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}.")
        if memory_size < k:
            raise ValueError(f"memory_size must be at least k = {k}, got {memory_size}.")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"threshold is a probability and must lie in (0, 1), got {threshold}.")
        if smoothing <= 0:
            raise ValueError(f"smoothing must be positive, got {smoothing}.")
        self.num_classes = num_classes
        self.k = k
        self.noise_rate = noise_rate
        self.threshold = threshold
        self.warmup_steps = warmup_steps
        self.smoothing = smoothing
        self.queue = FeatureQueue(memory_size, embedding_dim)
        self.cut = SmoothedCut(window)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _votes(self, ctx: FilterContext) -> tuple[Tensor, Tensor, Tensor]:
        """Scores ``(B,)``, NaN where unknown; suggested labels ``(B,)`` or -1; finite rows ``(B,)``."""
        label = ctx.label
        if label.is_cpu and bool(((label < 0) | (label >= self.num_classes)).any()):
            raise label_error(label, self.num_classes)
        finite = ctx.embedding.isfinite().all(dim=1)
        score = torch.full(label.shape, torch.nan, device=label.device, dtype=torch.float32)
        suggested = torch.full_like(label, -1)
        memory, _ = self.queue.get()
        if len(memory) < self.k:
            return score, suggested, finite
        rows = normalize(ctx.embedding.float(), dim=1)
        for part in torch.arange(len(label), device=label.device).split(max(_BLOCK // len(memory), 1)):
            voter, known = self._nearest(rows[part], ctx.index[part], finite[part])
            votes = (voter == label[part].unsqueeze(1)).sum(dim=1)
            log_p = ((votes.float() + self.smoothing / self.num_classes) / (self.k + self.smoothing)).log()
            score[part] = log_p.masked_fill(~known, torch.nan)
            same = (voter.unsqueeze(2) == voter.unsqueeze(1)).sum(dim=2)
            # ties between classes go to the nearer voter
            place = (same * self.k - torch.arange(self.k, device=voter.device)).argmax(dim=1, keepdim=True)
            suggested[part] = voter.gather(1, place).squeeze(1).masked_fill(~known, -1)
        return score, suggested, finite

    def _nearest(self, rows: Tensor, index: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of the voters ``(b, k)``, nearest first, and which rows have all of them ``(b,)``."""
        memory, memory_label = self.queue.get()
        assert memory_label is not None
        with exact_products(rows.device.type):
            similarity = rows @ memory.T
        similarity.masked_fill_(index.unsqueeze(1) == self.queue.get_index(), -torch.inf)
        similarity.masked_fill_(~finite.unsqueeze(1), -torch.inf)
        value, place = similarity.topk(self.k, dim=1)
        return memory_label[place], value[:, -1] > -torch.inf

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` float32 ``log P_clean``; NaN for rows without ``k`` voters or that are not finite."""
        return self._votes(ctx)[0]

    @torch.no_grad()
    def suggest(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` label of most of the voters; -1 if there are too few."""
        return self._votes(ctx)[1]

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch; ``stats``: ``suggested``, ``unknown`` and ``nonfinite`` ``(B,)``."""
        score, suggested, finite = self._votes(ctx)
        if self.threshold is None:
            ranked = score.masked_fill(self.steps < self.warmup_steps, torch.nan)
            drop, cut = self.cut.push(ranked, self.noise_rate)
        else:
            cut = score.new_full((), self.threshold).log()
            cut = cut.masked_fill(self.steps < self.warmup_steps, torch.nan)
            drop = score <= cut
        stats = {"suggested": suggested, "unknown": finite & score.isnan(), "nonfinite": ~finite}
        return Selection((finite & ~drop).float(), score, cut, stats)

    @torch.no_grad()
    def select_scores(self, score: Tensor) -> Selection:
        """The same rule for the scores ``(N,)`` of the whole training set, without the window."""
        if self.threshold is None:
            cut = share_cut(score, self.noise_rate)
        else:
            cut = score.new_full((), self.threshold).log()
        cut = cut.masked_fill(self.steps < self.warmup_steps, torch.nan)
        return Selection((~(score <= cut)).float(), score.float(), cut, {"unknown": score.isnan()})

    @torch.no_grad()
    def update(self, ctx: FilterContext, selection: Selection) -> None:
        """Write the kept, finite rows into the memory."""
        self.queue.enqueue(normalize(ctx.embedding.float(), dim=1), ctx.label, ctx.index, selection.keep)
        self.steps.add_(1)

    def extra_repr(self) -> str:
        return f"k={self.k}, noise_rate={self.noise_rate}, threshold={self.threshold}"
