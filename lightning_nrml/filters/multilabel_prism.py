"""PRISM for samples with many labels: each label, given or not, is judged by itself."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.cut import check_rate
from lightning_nrml.filters.label_groups import LabelGroups
from lightning_nrml.indexing import check_index
from lightning_nrml.memory.centers import last_of_each
from lightning_nrml.memory.label_centers import LabelCenters
from lightning_nrml.memory.writes import check_size
from lightning_nrml.precision import exact_products
from lightning_nrml.types import FilterContext, Selection

Judges = Literal["both", "classifier", "memory"]
Weighting = Literal["soft", "hard"]
_CLIP = 3.0  # standardised opinions beyond this say nothing more
_STATISTICS_DECAY = 0.95
_MIN_ROWS = 8  # fewer opinions in a batch do not change the statistics


class MultiLabelPRISM(NoiseFilter):
    """Weighs each label of each sample by the probability that it is right: extra and missing ones. Our own.

    Each time a sample is seen, up to two judges say of every label ``c`` how much the sample looks as if it
    had it, whatever the given label is:

    * *memory* (PRISM's idea): ``x . p_c - x . a_c``, the mean cosine to the last trusted embeddings of the
      samples that have the label minus that to those that have it not, *without the sample's own row*;
    * *classifier*: the module's own logit of the label, if it has any.

    Each judge is standardised, label by label, by the running mean and deviation of its own opinions, and
    clipped; the opinion is the mean of the judges that have one. The *evidence* on a sample and label is the
    running mean of the opinions over its visits. For each label
    :class:`~lightning_nrml.filters.label_groups.LabelGroups` fits two distributions of the evidence, of
    samples that truly lack the label and that truly have it, which samples with and without the given label
    share; the shares that contradict the given label are the rates of extra and missing ones, which are found
    and not given (``stats``: ``extra_rate``, ``missing_rate``, and ``label_rates`` for each label). By Bayes'
    rule ``score = log P(label is right | evidence, given label)``.

    With ``weighting="soft"`` the weight of a label is this probability, so that doubts cost little where they
    are wrong; with ``"hard"`` it is 1 if that is at least one half, else 0. Labels of a probability of at
    least one half are trusted: only they enter the memory.

    Labels without an opinion are kept. Non-finite rows are dropped, flagged in ``stats["nonfinite"]``, and
    neither judged nor remembered. During warm-up everything is kept and remembered while evidence gathers; it
    should last until the classifier ranks right labels above wrong ones.

    State: ``4 L + 4`` bytes for each sample, and the memory's ``4 D + L + 8`` for each slot.

    Args:
        num_labels: labels ``L``.
        embedding_dim: embedding size ``D``.
        num_samples: training samples ``N``.
        judges: ``both``, or only one of them; ``classifier`` holds no memory of embeddings.
        memory_size: slots of the memory; 0 = one for each sample.
        warmup_steps: number of :meth:`update` calls during which everything is kept.
        smoothing: weight in [0, 1) of earlier opinions in the evidence; 0 = only the last one counts.
        weighting: see above.
        noise_rate: ``None`` = estimated; a number in [0, 1) is the share of each label's given samples that
            are taken for extra, and as many samples are taken to lack it.

    Attributes:
        bank: :class:`~lightning_nrml.memory.label_centers.LabelCenters`, or ``None``.
        groups: :class:`~lightning_nrml.filters.label_groups.LabelGroups`.
        evidence: ``(N, L)`` float32, NaN = none. evidence_weight: ``(N,)`` float32 in [0, 1).
        opinion_mean, opinion_var: ``(2, L)`` float32, of memory and classifier; NaN = no statistics yet.
        steps: 0-d int64, updates so far.

    Raises:
        ValueError: for an argument outside its range.
    """

    evidence: Tensor
    evidence_weight: Tensor
    opinion_mean: Tensor
    opinion_var: Tensor
    steps: Tensor

    def __init__(
        self,
        num_labels: int,
        embedding_dim: int,
        num_samples: int,
        judges: Judges = "both",
        memory_size: int = 0,
        warmup_steps: int = 240,
        smoothing: float = 0.7,
        weighting: Weighting = "soft",
        noise_rate: float | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_labels", num_labels), ("num_samples", num_samples)):
            check_size(size, name, "MultiLabelPRISM")
        for name, value, known in (("judges", judges, Judges), ("weighting", weighting, Weighting)):
            if value not in get_args(known):
                raise ValueError(f"{name} is '{value}': choose one of {', '.join(get_args(known))}.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}.")
        if noise_rate is not None:
            check_rate(noise_rate)
        self.num_labels, self.num_samples, self.judges = num_labels, num_samples, judges
        self.warmup_steps, self.smoothing = warmup_steps, smoothing
        self.weighting, self.noise_rate = weighting, noise_rate
        self.requires = ("logits",) if judges == "classifier" else ()
        slots = memory_size or num_samples
        self.bank = None if judges == "classifier" else LabelCenters(num_labels, embedding_dim, slots)
        self.groups = LabelGroups(num_labels, _CLIP)
        self.register_buffer(
            "evidence", torch.full((num_samples, num_labels), torch.nan, dtype=torch.float32)
        )
        self.register_buffer("evidence_weight", torch.zeros(num_samples, dtype=torch.float32))
        for name in ("opinion_mean", "opinion_var"):
            self.register_buffer(name, torch.full((2, num_labels), torch.nan, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._last: tuple[FilterContext, dict[str, Tensor]] | None = None

    # -- judges -------------------------------------------------------------------------------------

    def _check(self, ctx: FilterContext) -> None:
        shape = (len(ctx), self.num_labels)
        if ctx.label.shape != shape:
            raise ValueError(
                f"MultiLabelPRISM needs 0/1 labels {shape}, got {tuple(ctx.label.shape)}: use it with "
                "multi-label data, and PRISM with one class per sample."
            )
        if ctx.logits is not None and ctx.logits.shape != shape:
            raise ValueError(f"MultiLabelPRISM needs logits {shape}, got {tuple(ctx.logits.shape)}.")
        check_index(ctx.index, self.num_samples, "MultiLabelPRISM")

    def _tables(self, ctx: FilterContext, rows: Tensor) -> Tensor:
        """``(2, B, L)`` float32 opinions of memory and classifier, NaN where one has none."""
        tables = rows.new_full((2, len(ctx), self.num_labels), torch.nan)
        if self.bank is not None:
            without, having = self.bank.means(rows, ctx.index)
            tables[0] = (having - without).float()
        if ctx.logits is not None and self.judges != "memory":
            tables[1] = ctx.logits.float()
        return tables

    def _judge(self, ctx: FilterContext) -> dict[str, Tensor]:
        """The opinions on a batch, what they do to the statistics, and the evidence with them."""
        self._check(ctx)
        rows = ctx.embedding.float()
        finite = rows.sum(dim=1).isfinite()
        if ctx.logits is not None:
            finite = finite & ctx.logits.float().sum(dim=1).isfinite()
        rows = F.normalize(torch.where(finite.unsqueeze(1), rows, 0.0), dim=1)
        with exact_products(rows.device.type):
            told = self._tables(ctx, rows)
        told = torch.where(finite.unsqueeze(1) & told.isfinite(), told, torch.nan)
        mean, var = self._statistics(told)
        opinion = (told - mean.unsqueeze(1)) / var.clamp_min(1e-12).sqrt().unsqueeze(1)
        opinion = opinion.clamp(-_CLIP, _CLIP).nanmean(dim=0)
        before, weight = self.evidence[ctx.index], self.evidence_weight[ctx.index]
        new_weight = self.smoothing * weight + (1 - self.smoothing)
        evidence = self.smoothing * before.nan_to_num(0.0) * weight.unsqueeze(1)
        evidence = (evidence + (1 - self.smoothing) * opinion) / new_weight.unsqueeze(1)
        # a label that is judged for the first time has no earlier opinion to average with
        evidence = torch.where(before.isnan(), opinion, evidence)
        return {
            "rows": rows,
            "finite": finite,
            "mean": mean,
            "var": var,
            "evidence": torch.where(opinion.isnan(), before, evidence),
            "weight": torch.where(opinion.isnan().all(dim=1), weight, new_weight),
        }

    def _statistics(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance ``(2, L)`` of the judges' opinions ``(2, B, L)``, this batch included."""
        there = ~told.isnan()
        count = there.sum(dim=1)
        mean = told.nan_to_num(0.0).sum(dim=1) / count.clamp_min(1)
        var = torch.where(there, (told - mean.unsqueeze(1)) ** 2, 0.0).sum(dim=1) / (count - 1).clamp_min(1)
        decay = torch.where(self.opinion_mean.isnan(), 0.0, _STATISTICS_DECAY)
        enough = count >= _MIN_ROWS
        old_mean, old_var = self.opinion_mean.nan_to_num(0.0), self.opinion_var.nan_to_num(0.0)
        new_mean = torch.where(enough, decay * old_mean + (1 - decay) * mean, self.opinion_mean)
        new_var = torch.where(enough, decay * old_var + (1 - decay) * var, self.opinion_var)
        return new_mean, new_var

    # -- contract -----------------------------------------------------------------------------------

    def _log_clean(self, evidence: Tensor, label: Tensor) -> Tensor:
        return F.logsigmoid(self.groups.log_odds(evidence, label)).float()

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B, L)`` float32 ``log P_clean`` by the evidence on record; NaN where there is none."""
        self._check(ctx)
        return self._log_clean(self.evidence[ctx.index], ctx.label)

    @torch.no_grad()
    def suggest(self, ctx: FilterContext) -> Tensor:
        """``(B, L)`` int64 labels that are more probable than not, by the evidence on record."""
        wrong = self.score(ctx) < torch.tensor(0.5).log()
        return torch.where(wrong, 1 - ctx.label, ctx.label)

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch.

        Returns:
            Weights and ``log P_clean`` ``(B, L)``, and the threshold log 1/2 (NaN during warm-up). ``stats``:
            ``nonfinite`` ``(B,)`` bool, ``noise_rate``, ``missing_rate``, ``extra_rate`` 0-d (estimated
            shares of wrong ones among all labels, absent ones and given ones), ``label_rates`` ``(2, L)``.
        """
        judged = self._judge(ctx)
        self._last = (ctx, judged)
        finite, score = judged["finite"].unsqueeze(1), self._log_clean(judged["evidence"], ctx.label)
        score = score.masked_fill(~finite, torch.nan)
        warm = self.steps < self.warmup_steps
        threshold = torch.where(warm, torch.nan, score.new_full((), 0.5).log())
        weight = score.exp() if self.weighting == "soft" else (score >= threshold).float()
        weight = torch.where(warm | score.isnan(), 1.0, weight) * finite
        return Selection(weight, score, threshold, {"nonfinite": ~judged["finite"], **self._rates()})

    def _rates(self) -> dict[str, Tensor]:
        rates, given = self.groups.rates(), self.groups.counts.sum(dim=2).double()
        wrong, total = (rates * given).sum(dim=1), given.sum(dim=1)
        missing, extra = wrong / total.clamp_min(1)
        return {
            "noise_rate": (wrong.sum() / total.sum().clamp_min(1)).float(),
            "missing_rate": missing.float(),
            "extra_rate": extra.float(),
            "label_rates": rates.float(),
        }

    @torch.no_grad()
    def update(self, ctx: FilterContext, selection: Selection) -> None:
        """Record the evidence, remember the trusted labels' rows, fit the groups."""
        last, self._last = self._last, None
        judged = last[1] if last is not None and last[0] is ctx else self._judge(ctx)
        self.opinion_mean.copy_(judged["mean"])
        self.opinion_var.copy_(judged["var"])
        final, once = last_of_each(ctx.index)
        evidence = judged["evidence"][final]
        self.groups.replace(self.evidence[ctx.index], evidence, ctx.label[final], once)
        self.evidence.index_copy_(0, ctx.index, evidence)
        self.evidence_weight.index_copy_(0, ctx.index, judged["weight"][final])
        self.groups.fit(self.steps < self.warmup_steps, self.noise_rate)
        if self.bank is not None:
            trusted = selection.keep.to(ctx.label.device) & judged["finite"].unsqueeze(1)
            self.bank.remember(ctx.index, judged["rows"], ctx.label, trusted)
        self.steps.add_(1)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"judges={self.judges}, warmup_steps={self.warmup_steps}, weighting={self.weighting}"
