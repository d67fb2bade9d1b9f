"""Consensus: a classifier and a memory judge each label, sample by sample, over the whole run."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.groups import ClassFloors, TwoGroups
from lightning_nrml.filters.vmf import concentration
from lightning_nrml.memory.centers import SampleCenters, last_of_each
from lightning_nrml.precision import exact_products
from lightning_nrml.state import StateModule
from lightning_nrml.types import FilterContext, Selection

_CLIP = 3.0  # standardised opinions beyond this say nothing more
_STATISTICS_DECAY = 0.95
_MIN_ROWS = 8  # fewer opinions in a batch do not change the statistics
_BARELY = 1e-3  # log-odds above even
_SPARED = 0.15  # of each class, the best
_ENOUGH = 50  # training samples per class from which the classifier counts as much as the memory


class SideClassifier(StateModule):
    """Softmax regression on detached embeddings, trained by Adam beside the net that makes them.

    Starts at zero, so that it is the same on every rank without a random number.

    Args:
        num_classes: number of classes ``C``. embedding_dim: embedding size ``D``.
        lr: learning rate. scale: inverse temperature of the products.

    Attributes:
        weight: ``(C, D)`` float32. first, second: its moments. steps: 0-d int64.
    """

    weight: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, lr: float = 3e-3, scale: float = 16.0) -> None:
        super().__init__()
        self.lr, self.scale = lr, scale
        for name in ("weight", "first", "second"):
            self.register_buffer(name, torch.zeros(num_classes, embedding_dim, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Tensor) -> Tensor:
        """``(B, C)`` logits of unit rows ``(B, D)``."""
        return self.scale * (rows @ self.weight.T)

    def learn(self, rows: Tensor, label: Tensor, weight: Tensor) -> None:
        """One step of Adam on the weighted mean cross-entropy."""
        error = self(rows).softmax(dim=1)
        error.scatter_add_(1, label.unsqueeze(1), -torch.ones_like(error[:, :1]))
        error.mul_((weight / weight.sum().clamp_min(1e-9)).unsqueeze(1))
        gradient = self.scale * (error.T @ rows)
        self.steps.add_(1)
        self.first.lerp_(gradient, 0.1)
        self.second.lerp_(gradient**2, 0.001)
        first = self.first / (1 - 0.9**self.steps)
        second = self.second / (1 - 0.999**self.steps)
        self.weight.sub_(self.lr * first / (second.sqrt() + 1e-8))


class Consensus(NoiseFilter):
    """Two judges, one record per sample, and a noise rate that is found, not given. Our own method.

    Each time a sample is seen, two judges give the log-odds of its given label ``y`` against all others:

    * *memory*: densities of one von Mises-Fisher distribution per class, ``kappa m_k . x``, around the
      directions ``m_k`` of the class's last trusted embeddings, *without the sample's own*. All classes share
      one concentration, from the mean cosine of two different rows of a class.
    * *classifier*: the module's own logits, if its loss has classes or proxies; else a softmax regression on
      detached embeddings that the filter trains by itself.

    Their log-odds have nothing like the same scale, so each judge is standardised by the running mean and
    deviation of its own opinions, and clipped. On natural images with few classes both rank wrong labels
    about equally well; on many small classes the classifier is far behind, so below 50 training samples per
    class it counts as the square of their share of 50. The opinion on a sample is the weighted mean of the
    judges that have one, and the *evidence* the running mean of its opinions: one look at an embedding that
    still learns is noisy.

    What evidence a *wrong* label gets is known: the judges say on the way how they find another class than
    the given one, drawn once for each sample. The more of the evidence on record lies as low as that, the
    more labels are wrong (:class:`~lightning_nrml.filters.groups.TwoGroups`). ``stats["noise_rate"]`` is
    that share, and about as much of the lowest evidence is taken for wrong: there ``score = log P_clean`` is
    under log 1/2, and the sample is dropped. The best of each class, 15 %, count as just clean at least: a
    class that is hard to learn would else lose all its samples, and with them its place in the memory.

    People's mistakes look more like the given class than a random one does, so only part of them is found
    that way: then say what you know by ``noise_rate``.

    Rows without any opinion are kept and flagged in ``stats["unknown"]``. Non-finite rows are dropped,
    flagged in ``stats["nonfinite"]``, and neither judged nor remembered. During warm-up everything is kept
    and remembered while evidence gathers.

    Args:
        num_classes: number of classes ``C``; labels lie in ``0..C-1``.
        embedding_dim: embedding size ``D``, at least 2.
        num_samples: training samples ``N``.
        warmup_steps: number of :meth:`update` calls during which everything is kept.
        smoothing: weight in [0, 1) of earlier opinions in the evidence; 0 = only the last one counts.
        noise_rate: share of wrong labels in [0, 1), if it is known; ``None`` = find it.

    Attributes:
        bank: :class:`~lightning_nrml.memory.centers.SampleCenters`, the trusted rows.
        side: :class:`SideClassifier`. groups: :class:`TwoGroups`. floors: :class:`ClassFloors`.
        evidence: ``(N,)`` float32, NaN = none. evidence_weight: ``(N,)`` float32 in [0, 1).
        other_evidence: ``(N,)`` float32, the same for another class than the given one.
        opinion_mean, opinion_var: ``(2,)`` float32, of memory and classifier; NaN = no statistics yet.
        weights: ``(2,)`` float32, of memory and classifier in an opinion; follows from the sizes.
        steps: 0-d int64, updates so far.

    Raises:
        ValueError: for an argument outside its range.
    """

    granularities: ClassVar[tuple[str, ...]] = ("batch", "epoch")
    max_rbar: ClassVar[float] = 0.98

    evidence: Tensor
    other_evidence: Tensor
    evidence_weight: Tensor
    opinion_mean: Tensor
    opinion_var: Tensor
    weights: Tensor
    steps: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        num_samples: int,
        warmup_steps: int = 150,
        smoothing: float = 0.7,
        noise_rate: float | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim < 2:
            raise ValueError(f"embedding_dim must be at least 2, got {embedding_dim}.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}.")
        if noise_rate is not None and not 0 <= noise_rate < 1:
            raise ValueError(f"noise_rate must lie in [0, 1) or be None (found), got {noise_rate}.")
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.num_samples = num_samples
        self.noise_rate = noise_rate
        self.warmup_steps = warmup_steps
        self.smoothing = smoothing
        self.bank = SampleCenters(num_classes, embedding_dim, num_samples)
        self.side = SideClassifier(num_classes, embedding_dim)
        # another class than a wrong one is the right one in one of C - 1 cases
        self.groups = TwoGroups(_CLIP, mixed=1 / max(num_classes - 1, 1))
        self.floors = ClassFloors(num_classes, num_samples, _CLIP)
        for name in ("evidence", "other_evidence"):
            self.register_buffer(name, torch.full((num_samples,), torch.nan, dtype=torch.float32))
        self.register_buffer("evidence_weight", torch.zeros(num_samples, dtype=torch.float32))
        for name in ("opinion_mean", "opinion_var"):
            self.register_buffer(name, torch.full((2,), torch.nan, dtype=torch.float32))
        classifier = min(1.0, num_samples / num_classes / _ENOUGH) ** 2
        weights = torch.tensor([1.0, classifier], dtype=torch.float32)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._last: tuple[FilterContext, dict[str, Tensor]] | None = None

    # -- judges -------------------------------------------------------------------------------------

    def _memory_scores(self, rows: Tensor, index: Tensor, label: Tensor) -> Tensor:
        """``(B, C)`` log-densities up to a constant; NaN in the given column without a row but the own."""
        bank = self.bank
        length = torch.linalg.vector_norm(bank.centers, dim=1)
        cosine = rows @ (bank.centers / length.clamp_min(1e-12).unsqueeze(1)).T
        total, others = bank.without_self(index, label)
        own = (rows * F.normalize(total, dim=1).float()).sum(dim=1)
        own = torch.where(others > 0, own, torch.nan)
        cosine = cosine.masked_fill(~bank.filled, -torch.inf).scatter(1, label.unsqueeze(1), own.unsqueeze(1))
        count = bank.class_count.double()
        pairs = count * (count - 1)
        cohesion = ((count * length.double()) ** 2 - count).sum() / pairs.sum().clamp_min(1)
        kappa = concentration(cohesion.clamp_min(0).sqrt(), self.embedding_dim, self.max_rbar)
        return kappa.float() * cosine

    def _classifier_scores(self, ctx: FilterContext, rows: Tensor) -> Tensor:
        """``(B, C)`` logits."""
        if ctx.logits is None:
            return self.side(rows)
        if ctx.logits.shape != (len(ctx), self.num_classes):
            raise ValueError(
                f"Consensus needs logits ({len(ctx)}, {self.num_classes}), got {tuple(ctx.logits.shape)}: "
                "give the loss as many classes as the training set has."
            )
        return ctx.logits.float()

    def _judge(self, ctx: FilterContext) -> dict[str, Tensor]:
        """Both opinions on a batch, what they do to the statistics, and the evidence with them."""
        rows, finite, _ = self.bank.unit_rows(ctx.embedding, ctx.label)
        rows = torch.where(finite.unsqueeze(1), rows, 0.0)
        with exact_products(rows.device.type):
            tables = [self._memory_scores(rows, ctx.index, ctx.label), self._classifier_scores(ctx, rows)]
        odds, others = (
            torch.stack([_log_odds(t, column) for t in tables])
            for column in (ctx.label, other_class(ctx.index, ctx.label, self.num_classes))
        )
        odds = torch.where(finite & odds.isfinite(), odds, torch.nan)
        others = torch.where(finite & others.isfinite(), others, torch.nan)
        mean, var = self._statistics(odds)
        opinion, other = (
            _weighted_mean(
                ((x - mean.unsqueeze(1)) / var.clamp_min(1e-12).sqrt().unsqueeze(1)).clamp(-_CLIP, _CLIP),
                self.weights.unsqueeze(1),
            )
            for x in (odds, others)
        )
        # evidence on a label that the sample no longer has (corrected labels) says nothing of this one
        same = self.floors.label[ctx.index] == ctx.label
        weight = self.evidence_weight[ctx.index] * same
        before, before_other = (
            x[ctx.index].masked_fill(~same, torch.nan) for x in (self.evidence, self.other_evidence)
        )
        new_weight = torch.where(opinion.isnan(), weight, self.smoothing * weight + (1 - self.smoothing))
        best = _weighted_mean(torch.stack([_standardised(t) for t in tables]), self.weights.view(2, 1, 1))
        return {
            "rows": rows,
            "finite": finite,
            "mean": mean,
            "var": var,
            "opinion": opinion,
            "evidence": self._running(before, opinion, weight),
            "other": self._running(before_other, other, weight),
            "weight": new_weight,
            "suggested": best.nan_to_num(-torch.inf)
            .argmax(dim=1)
            .masked_fill(~(finite & self.bank.filled.any()), -1),
        }

    def _running(self, before: Tensor, opinion: Tensor, weight: Tensor) -> Tensor:
        """Running mean of opinions, without the bias of a start value; NaN says nothing."""
        weight = self.smoothing * torch.where(before.isnan(), 0.0, weight)
        new = 1 - self.smoothing
        mean = (before.nan_to_num(0.0) * weight + opinion * new) / (weight + new)
        return torch.where(opinion.isnan(), before, mean)

    def _statistics(self, odds: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance ``(2,)`` of each judge's log-odds ``(2, B)``, this batch included."""
        there = ~odds.isnan()
        count = there.sum(dim=1)
        mean = odds.nan_to_num(0.0).sum(dim=1) / count.clamp_min(1)
        var = torch.where(there, (odds - mean.unsqueeze(1)) ** 2, 0.0).sum(dim=1) / (count - 1).clamp_min(1)
        enough = count >= _MIN_ROWS
        fresh = self.opinion_mean.isnan()
        decay = torch.where(fresh, 0.0, _STATISTICS_DECAY)
        old_mean, old_var = self.opinion_mean.nan_to_num(0.0), self.opinion_var.nan_to_num(0.0)
        new_mean = torch.where(enough, decay * old_mean + (1 - decay) * mean, self.opinion_mean)
        new_var = torch.where(enough, decay * old_var + (1 - decay) * var, self.opinion_var)
        return new_mean, new_var

    # -- contract -----------------------------------------------------------------------------------

    def _log_clean(self, evidence: Tensor, label: Tensor) -> Tensor:
        odds = self.groups.log_odds(evidence, self.noise_rate)
        spared = self.floors.among_best(evidence, label, _SPARED)
        least = _BARELY * (evidence.double() + _CLIP + 1)
        return F.logsigmoid(torch.where(spared, odds.maximum(least), odds)).float()

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` float32 ``log P_clean`` by the evidence on record; NaN where there is none.

        A label that is not the one on record, such as a suggested one, is judged by what the judges say now.
        """
        evidence, counted = self.evidence[ctx.index], self.floors.label[ctx.index]
        other = (counted >= 0) & (counted != ctx.label)
        if bool(other.any()):
            evidence = torch.where(other, self._judge(ctx)["opinion"], evidence)
        return self._log_clean(evidence, ctx.label)

    @torch.no_grad()
    def suggest(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` label that the judges together find most likely; -1 if there is none."""
        return self._judge(ctx)["suggested"]

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch.

        Returns:
            Weights 0/1, ``log P_clean`` ``(B,)``, and the threshold log 1/2 (NaN during warm-up). ``stats``:
            ``unknown`` and ``nonfinite`` ``(B,)`` bool, ``suggested`` ``(B,)`` int64, ``noise_rate`` 0-d.
        """
        judged = self._judge(ctx)
        self._last = (ctx, judged)
        score, finite = self._log_clean(judged["evidence"], ctx.label), judged["finite"]
        score = score.masked_fill(~finite, torch.nan)
        threshold = score.new_full((), 0.5).log()
        threshold = torch.where(self.steps < self.warmup_steps, torch.nan, threshold)
        stats = {
            "unknown": finite & score.isnan(),
            "nonfinite": ~finite,
            "suggested": judged["suggested"],
            "noise_rate": self.groups.cut()[1].float(),
        }
        return Selection((finite & ~(score < threshold)).float(), score, threshold, stats)

    @torch.no_grad()
    def select_scores(self, score: Tensor) -> Selection:
        """Keep what is at least as likely clean as not; NaN is kept, and during warm-up everything."""
        threshold = score.new_full((), 0.5).log().masked_fill(self.steps < self.warmup_steps, torch.nan)
        return Selection(
            (~(score < threshold)).float(), score, threshold, {"noise_rate": self.groups.cut()[1]}
        )

    @torch.no_grad()
    def update(self, ctx: FilterContext, selection: Selection) -> None:
        """Record the evidence, remember the kept rows, train the side classifier."""
        last, self._last = self._last, None
        judged = last[1] if last is not None and last[0] is ctx else self._judge(ctx)
        self.opinion_mean.copy_(judged["mean"])
        self.opinion_var.copy_(judged["var"])
        final, once = last_of_each(ctx.index)
        evidence, weight = judged["evidence"][final], judged["weight"][final]
        before, other = self.evidence[ctx.index], judged["other"][final]
        self.groups.values.replace(before, evidence, once)
        self.groups.low.replace(self.other_evidence[ctx.index], other, once)
        self.floors.replace(ctx.index, before, evidence, ctx.label[final], once)
        self.evidence.index_copy_(0, ctx.index, evidence)
        self.other_evidence.index_copy_(0, ctx.index, other)
        self.evidence_weight.index_copy_(0, ctx.index, weight)
        rows, keep = judged["rows"], selection.keep.to(ctx.label.device) & judged["finite"]
        self.bank.remember(ctx.index, rows, ctx.label, keep)
        if ctx.logits is None:
            with exact_products(rows.device.type):
                self.side.learn(rows, ctx.label, keep.float())
        self.steps.add_(1)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        told = "found" if self.noise_rate is None else self.noise_rate
        return f"warmup_steps={self.warmup_steps}, smoothing={self.smoothing}, noise_rate={told}"


def other_class(index: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """``(B,)`` a class that is not the given one, the same at every visit: by a hash of the index."""
    mixed = (index * 2654435761 + 1013904223) % (1 << 32)
    mixed = (mixed ^ (mixed >> 15)) * 668265261 % (1 << 32)
    return (label + 1 + (mixed >> 8) % max(num_classes - 1, 1)) % num_classes


def _log_odds(scores: Tensor, label: Tensor) -> Tensor:
    """``(B,)`` log-odds of the given column of log-scores ``(B, C)`` against all others."""
    column = label.unsqueeze(1)
    given = scores.gather(1, column).squeeze(1)
    return given - scores.scatter(1, column, -torch.inf).logsumexp(dim=1)


def _standardised(scores: Tensor) -> Tensor:
    """Rows of ``(B, C)`` with mean 0 and deviation 1 over their finite entries; others stay as they are."""
    there = scores.isfinite()
    count = there.sum(dim=1, keepdim=True).clamp_min(1)
    centred = scores - torch.where(there, scores, 0.0).sum(dim=1, keepdim=True) / count
    spread = torch.where(there, centred**2, 0.0).sum(dim=1, keepdim=True) / count
    return centred / spread.clamp_min(1e-12).sqrt()


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over the first dimension of what is not NaN; NaN where nothing is."""
    weight = torch.where(values.isnan(), 0.0, weight)
    return (values.nan_to_num(0.0, neginf=-torch.inf) * weight).sum(dim=0) / weight.sum(dim=0)
