"""PRISM: keep the samples whose given label agrees with the features of earlier batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, normalize

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.rank_rule import lowest, quantile, rank_rule
from lightning_nrml.filters.vmf import concentration, log_normalizer
from lightning_nrml.memory import CenterMemory
from lightning_nrml.precision import exact_products
from lightning_nrml.types import FilterContext, Selection


class PRISM(NoiseFilter, CenterMemory):
    """Probabilistic Ranking-based Instance Selection with Memory.

    Each sample gets the probability that its given label is right, judged by the class centres of a
    memory of kept features of earlier batches; the least probable ones are left out of the losses and of
    the memory. Liu et al., "Noise-resistant Deep Metric Learning with Ranking-based Instance Selection",
    CVPR 2021 (arXiv 2103.16047, eq. 2-7) and its extension arXiv 2108.01431 (vMF-Sim).

    Score: ``log P_clean = s_y - log sum_k exp s_k`` over the classes that have a centre.
        ``"avg"``: ``s_k = w_k . x`` with ``w_k`` the plain mean of the class's memory rows (its length
        carries the class's spread), the mean cosine to these rows.
        ``"vmf"``: ``s_k`` is the log-density of a von Mises-Fisher distribution fitted to them.
        ``"proxy"`` (ProxySim, first version of arXiv 2108.01431): ``w_k`` is the unit proxy that the loss
            has learned for the class (``ctx.proxies``); there is no memory.
    Threshold (sTRM): ``Q`` is the ``int(noise_rate * n)``-th smallest ``P_clean`` of the batch; rows
    strictly above the mean of ``Q`` over the last ``window`` batches, this one included, are kept.
    ``window=1`` is the paper's TRM: without ties, exactly ``int(noise_rate * n)`` rows are dropped.

    Rules where paper and official code are silent, ambiguous or fail:
        * A row whose class has no centre gets score NaN, is kept, and is flagged in
          ``stats["unknown"]``. Such rows do not count in ``n``: otherwise a batch with many new classes
          would lose far more than the noise rate of its other rows.
        * A row with a non-finite embedding is dropped, flagged in ``stats["nonfinite"]``, never
          remembered, and does not count in ``n``. In whole-set decisions it never comes up: the feature
          bank refuses such rows, so the sample is judged by its last finite embedding, or kept (NaN).
        * ``int(noise_rate * n) = 0`` keeps everything. ``Q`` with ``P_clean`` exactly 1 (a single class
          has a centre) says nothing and is not pushed; a row of ``P_clean`` 1 is only ever dropped by
          an earlier, higher threshold - that is, never.
        * If nothing is above the mean, this batch falls back to dropping exactly the
          ``int(noise_rate * n)`` lowest and the window is cut to its last value. Ties there are broken
          by dataset index, so decisions do not depend on the order of the batch. In the usual rule the
          comparison is strict: rows tied with the threshold are dropped.
        * The mean is taken over probabilities for ``"avg"``, as in the official code. vMF thresholds span
          hundreds of nats, where a mean of probabilities only sees the highest and one of logs the
          lowest: ``"vmf"`` takes the mean of the middle half of the logs.
        * The memory is a plain ring; a class's centre is refreshed whenever one of its rows comes or
          goes, and a class without rows loses it.
        * During warm-up everything is kept and remembered, no threshold is pushed, and centres are made
          (in the official code a class that was only seen in warm-up stays unknown).

    Costs per step do not depend on ``memory_size``, and nothing waits for the device.

    Args:
        num_classes: number of classes ``C``; labels lie in ``0..C-1`` (checked on the CPU only).
        embedding_dim: embedding size ``D``.
        noise_rate: assumed share ``R`` of wrong labels, in [0, 1).
        memory_size: rows ``M`` of the memory; about the size of the training set works best.
        window: number of batches over which the threshold is smoothed; 1 = none.
        similarity: ``"avg"`` (AvgSim), ``"vmf"`` (vMF-Sim) or ``"proxy"`` (ProxySim).
        warmup_steps: number of :meth:`update` calls during which everything is kept.
        count_empty_classes: let classes without a centre count in the denominator, as the official code
            does (``exp(0)`` each; for ``"vmf"`` the uniform density). Default off.
        shared_kappa: for ``"vmf"``, one concentration for all classes (from the row-weighted mean of
            ``rbar^2``) instead of the paper's one per class. A class of few rows looks far tighter than
            it is, drops its own clean rows for it, and so stays small. In simulations of half wrong
            labels (98 x 60 rows, D = 512; 600 x 8, D = 128) the AUROC of the score after 4 epochs was
            0.76 and 0.71 with one kappa per class, 0.95 and 0.82 for ``"avg"``, 1.00 and 0.99 shared.

    Attributes:
        memory: ``(M, D)`` float32 unit rows. memory_label: ``(M,)`` int64, -1 = empty.
        centers: ``(C, D)`` float32, zero without rows. filled: ``(C,)`` bool, has a centre.
        class_sum: ``(C, D)`` float64, sum of each class's rows. class_count: ``(C,)`` int64, their number.
        window_values: ``(window,)`` float64, last thresholds as ``log P_clean``, newest last, NaN = empty.
        pointer, count, steps: 0-d int64: next row to write, rows in use, updates so far.

    Raises:
        ValueError: for an argument outside its range.
    """

    granularities: ClassVar[tuple[str, ...]] = ("batch", "epoch")
    max_rbar: ClassVar[float] = 0.98

    window_values: Tensor
    steps: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        noise_rate: float = 0.5,
        memory_size: int = 8192,
        window: int = 30,
        similarity: Literal["avg", "vmf", "proxy"] = "avg",
        warmup_steps: int = 0,
        count_empty_classes: bool = False,
        shared_kappa: bool = False,
    ) -> None:
        if similarity not in ("avg", "vmf", "proxy"):
            raise ValueError(f"similarity must be 'avg', 'vmf' or 'proxy', got {similarity!r}.")
        super().__init__(num_classes, embedding_dim, 1 if similarity == "proxy" else memory_size)
        for name, value, least in (
            ("embedding_dim", embedding_dim, 2 if similarity == "vmf" else 1),
            ("window", window, 1),
            ("warmup_steps", warmup_steps, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= noise_rate < 1:
            raise ValueError(
                f"noise_rate must lie in [0, 1), e.g. 0.5 for half of the labels; got {noise_rate}."
            )
        if shared_kappa and similarity != "vmf":
            raise ValueError("shared_kappa=True needs similarity='vmf'; AvgSim has no concentration.")
        if similarity == "proxy":
            self.requires = ("proxies",)
        self.noise_rate = noise_rate
        self.window = window
        self.similarity = similarity
        self.warmup_steps = warmup_steps
        self.count_empty_classes = count_empty_classes
        self.shared_kappa = shared_kappa
        self.register_buffer("window_values", torch.full((window,), torch.nan, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._last: list[Any] = []  # what ``select`` made of the last batch: context, unit rows, which finite

    # -- scores -------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` float32 ``log P_clean``; NaN where the class has no centre or the row is not finite."""
        rows, _, known = self._unit_rows(ctx)
        return self._log_prob(self._class_scores(rows), ctx.label).masked_fill_(~known, torch.nan).float()

    @torch.no_grad()
    def suggest(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` most probable label among the classes with a centre; -1 if there is none."""
        rows, finite, _ = self._unit_rows(ctx)
        return self._suggestion(self._class_scores(rows), finite)

    def _unit_rows(self, ctx: FilterContext) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised rows ``(B, D)``, which are finite ``(B,)``, and have a class with a centre."""
        if self.similarity == "proxy":
            self._take_proxies(ctx)
        return self.unit_rows(ctx.embedding, ctx.label)

    def _take_proxies(self, ctx: FilterContext) -> None:
        """ProxySim: the loss's unit proxies are the centres; whole-set scores use those of the last step."""
        if ctx.proxies is None:
            return
        if ctx.proxies.shape != self.centers.shape:
            raise ValueError(
                f"PRISM needs proxies {tuple(self.centers.shape)}, one per class, "
                f"got {tuple(ctx.proxies.shape)}; use a loss with one proxy per class."
            )
        unit = normalize(ctx.proxies.float(), dim=1)
        self.filled.copy_(unit.isfinite().all(dim=1))
        self.centers.copy_(torch.where(self.filled.unsqueeze(1), unit, 0.0))

    def _class_scores(self, rows: Tensor) -> Tensor:
        """Log-scores ``s`` ``(B, C)``, -inf for classes without a centre; float64 for ``"vmf"``."""
        avg, filled = self.similarity != "vmf", self.filled
        with exact_products(rows.device.type):
            if avg and filled.is_cpu and filled.all():  # the usual case; only the CPU may look
                return rows @ self.centers.T
            bias = torch.where(filled, 0.0, -torch.inf)
            if avg:
                return torch.addmm(bias, rows, self.centers.T)
            product = rows @ self.centers.T
        rbar = torch.linalg.vector_norm(self.centers, dim=1, dtype=torch.float64)
        spread = rbar
        if self.shared_kappa:
            rows_per_class = self.class_count.double()
            mean_square = (rows_per_class * rbar**2).sum() / rows_per_class.sum().clamp_min(1)
            spread = torch.where(self.filled, mean_square.sqrt(), 0.0)
        kappa = concentration(spread, self.embedding_dim, self.max_rbar)
        slope = kappa / rbar.clamp_min(1e-12)
        return product.double().mul_(slope).add_(log_normalizer(kappa, self.embedding_dim) + bias)

    def _suggestion(self, scores: Tensor, finite: Tensor) -> Tensor:
        """``(B,)`` class of the highest score, -1 where there is none."""
        return _argmax(scores).masked_fill_(~(finite & self.filled.any()), -1)

    def _log_prob(self, scores: Tensor, label: Tensor) -> Tensor:
        """``log P_clean`` ``(B,)`` of the type of ``scores``, which it uses up; void for unknown rows."""
        column = label.unsqueeze(1)
        given = scores.gather(1, column).squeeze(1)
        if self.similarity != "vmf":
            total = scores.exp_().sum(dim=1)  # |s| <= 1, so the exponential needs no shift
            if self.count_empty_classes:
                total += self.num_classes - self.filled.sum()
            # with two classes or more log P is below -0.12: hardshrink only makes a single class's 0 exact
            return hardshrink(given - total.log_(), 1e-3)
        # log-odds against all other classes first: 1 - P may be far below the float64 epsilon
        others = scores.scatter_(1, column, -torch.inf).logsumexp(dim=1)
        if self.count_empty_classes:
            uniform = log_normalizer(others.new_zeros(()), self.embedding_dim)
            others = others.logaddexp(uniform + (self.num_classes - self.filled.sum()).double().log())
        return -torch.logaddexp(others - given, torch.zeros_like(given))

    # -- decisions ----------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch and push its threshold into the window.

        Returns:
            Weights 0/1 and scores ``(B,)``; ``threshold`` is the ``log P_clean`` that had to be passed
            (NaN if none applied). ``stats``: ``unknown`` and ``nonfinite`` ``(B,)`` bool;
            ``suggested`` ``(B,)`` int64, as from :meth:`suggest`; ``quantile``, this batch's own
            ``log Q``, and ``fallback``, whether the plain TRM rule was used, both 0-d.
        """
        rows, finite, known = self._unit_rows(ctx)
        self._last[:] = ctx, rows, finite
        scores = self._class_scores(rows)
        plain = known.is_cpu and bool(known.all())  # the usual case needs no masks; only the CPU may look
        suggested = _argmax(scores) if plain else self._suggestion(scores, finite)
        log_prob = self._log_prob(scores, ctx.label)
        if not plain:
            log_prob.masked_fill_(~known, torch.nan)
        active = self.steps >= self.warmup_steps if self.warmup_steps else None
        decided = rank_rule(
            log_prob, ctx.index, self.window_values, self.noise_rate, self.similarity == "vmf", active
        )
        stats = {
            "unknown": finite ^ known,
            "nonfinite": ~finite,
            "suggested": suggested,
            "quantile": decided.quantile.float(),
            "fallback": decided.fallback,
        }
        return Selection((finite & ~decided.drop).float(), log_prob.float(), decided.threshold.float(), stats)

    @torch.no_grad()
    def select_scores(self, score: Tensor) -> Selection:
        """TRM on the scores ``(N,)`` of the whole training set: drops the ``int(noise_rate * n)`` lowest.

        ``n`` counts the samples with an opinion; NaN is kept. Ties are broken by position, and a sample
        of ``P_clean`` exactly 1 is never dropped. The window is neither used nor changed. During warm-up
        all are kept.
        """
        unknown = score.isnan()
        if int(self.steps) < self.warmup_steps:
            return replace(Selection.keep_all(score), score=score.float(), stats={"unknown": unknown})
        remove, threshold = quantile(score, self.noise_rate)
        drop = lowest(score, torch.arange(len(score), device=score.device), remove)
        return Selection((~drop).float(), score.float(), threshold.float(), {"unknown": unknown})

    # -- memory -------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, ctx: FilterContext, selection: Selection) -> None:
        """Write the kept, finite rows into the ring, oldest rows first to go, and refresh their centres."""
        selected = self._last and self._last[0] is ctx  # ``select`` has normalised this very batch already
        rows, finite = self._last[1:] if selected else self._unit_rows(ctx)[:2]
        self._last.clear()
        if self.similarity != "proxy":
            self.remember(rows, ctx.label, selection.keep.to(rows.device) & finite)
        self.steps.add_(1)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, "
            f"noise_rate={self.noise_rate}, memory_size={self.memory_size}, window={self.window}, "
            f"similarity={self.similarity!r}, warmup_steps={self.warmup_steps}, "
            f"count_empty_classes={self.count_empty_classes}, shared_kappa={self.shared_kappa}"
        )


def _argmax(scores: Tensor) -> Tensor:
    """``scores.argmax(dim=1)``; on a CPU by NumPy, which unlike torch has vector instructions for it.

    Ties go to the smallest column.
    """
    return torch.from_numpy(scores.numpy().argmax(axis=1)) if scores.is_cpu else scores.argmax(dim=1)
