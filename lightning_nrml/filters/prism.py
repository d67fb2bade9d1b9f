"""PRISM: keep the samples whose given label agrees with the features of earlier batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.vmf import concentration, log_normalizer
from lightning_nrml.types import FilterContext, Selection

# Rows enter the memory rounded to multiples of 2^-30, finer than float32 resolves unit rows where it
# matters. Float64 sums of up to 2^23 such rows are exact: adding and taking off rows never drifts, does
# not depend on the order of additions (equal on all ranks), and equals a rebuilt sum bit for bit.
_GRID = 2.0**30
_MAX_MEMORY = 2**23


class PRISM(NoiseFilter):
    """Probabilistic Ranking-based Instance Selection with Memory.

    Each sample gets the probability that its given label is right, judged by the class centres of a
    memory of kept features of earlier batches; the least probable ones are left out of the losses and of
    the memory. Liu et al., "Noise-resistant Deep Metric Learning with Ranking-based Instance Selection",
    CVPR 2021 (arXiv 2103.16047, eq. 2-7) and its extension arXiv 2108.01431 (vMF-Sim).

    Score: ``log P_clean = s_y - log sum_k exp s_k`` over the classes that have a centre.
        ``"avg"``: ``s_k = w_k . x`` with ``w_k`` the plain mean of the class's memory rows (its length
        carries the class's spread), the mean cosine to these rows.
        ``"vmf"``: ``s_k`` is the log-density of a von Mises-Fisher distribution fitted to them.
    Threshold (sTRM): ``Q`` is the ``int(noise_rate * n)``-th smallest ``P_clean`` of the batch; rows
    strictly above the mean of ``Q`` over the last ``window`` batches, this one included, are kept.
    ``window=1`` is the paper's TRM: without ties, exactly ``int(noise_rate * n)`` rows are dropped.

    Rules where paper and official code are silent, ambiguous or fail:
        * A row whose class has no centre gets score NaN, is kept, and is flagged in
          ``stats["unknown"]``. Such rows do not count in ``n``: otherwise a batch with many new classes
          would lose far more than the noise rate of its other rows.
        * A row with a non-finite embedding is dropped, flagged in ``stats["nonfinite"]``, never
          remembered, and does not count in ``n``.
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
        similarity: ``"avg"`` (AvgSim) or ``"vmf"`` (vMF-Sim).
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

    memory: Tensor
    memory_label: Tensor
    centers: Tensor
    filled: Tensor
    class_sum: Tensor
    class_count: Tensor
    window_values: Tensor
    pointer: Tensor
    count: Tensor
    steps: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        noise_rate: float = 0.5,
        memory_size: int = 8192,
        window: int = 30,
        similarity: Literal["avg", "vmf"] = "avg",
        warmup_steps: int = 0,
        count_empty_classes: bool = False,
        shared_kappa: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("embedding_dim", embedding_dim, 2 if similarity == "vmf" else 1),
            ("memory_size", memory_size, 1),
            ("window", window, 1),
            ("warmup_steps", warmup_steps, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if memory_size > _MAX_MEMORY:
            raise ValueError(f"memory_size must be at most {_MAX_MEMORY}, got {memory_size}.")
        if not 0 <= noise_rate < 1:
            raise ValueError(
                f"noise_rate must lie in [0, 1), e.g. 0.5 for half of the labels; got {noise_rate}."
            )
        if shared_kappa and similarity != "vmf":
            raise ValueError("shared_kappa=True needs similarity='vmf'; AvgSim has no concentration.")
        if similarity not in ("avg", "vmf"):
            raise ValueError(f"similarity must be 'avg' or 'vmf', got {similarity!r}.")
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.noise_rate = noise_rate
        self.memory_size = memory_size
        self.window = window
        self.similarity = similarity
        self.warmup_steps = warmup_steps
        self.count_empty_classes = count_empty_classes
        self.shared_kappa = shared_kappa
        self.register_buffer("memory", torch.zeros(memory_size, embedding_dim))
        self.register_buffer("memory_label", torch.full((memory_size,), -1))
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("class_sum", torch.zeros(num_classes, embedding_dim, dtype=torch.float64))
        self.register_buffer("class_count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("window_values", torch.full((window,), torch.nan, dtype=torch.float64))
        for name in ("pointer", "count", "steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    # -- scores -------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` float32 ``log P_clean``; NaN where the class has no centre or the row is not finite."""
        rows, finite = self._unit_rows(ctx)
        return self._log_prob(rows, finite & self.filled[ctx.label], ctx.label).float()

    @torch.no_grad()
    def suggest(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` most probable label among the classes with a centre; -1 if there is none."""
        rows, finite = self._unit_rows(ctx)
        best = self._class_scores(rows).masked_fill(~self.filled, -torch.inf).argmax(dim=1)
        return torch.where(finite & self.filled.any(), best, -1)

    def _unit_rows(self, ctx: FilterContext) -> tuple[Tensor, Tensor]:
        """Normalised float32 rows ``(B, D)``, zero where not finite, and the finite mask ``(B,)``."""
        rows, label = ctx.embedding.detach().float(), ctx.label
        if rows.ndim != 2 or rows.shape[1] != self.embedding_dim or label.shape != rows.shape[:1]:
            raise ValueError(
                f"PRISM needs embeddings (B, {self.embedding_dim}) and one class label per row; got "
                f"embeddings {tuple(rows.shape)} and labels {tuple(label.shape)}. Set embedding_dim to match."
            )
        if label.device.type == "cpu" and len(label):
            low, high = (int(v) for v in label.aminmax())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"label {low if low < 0 else high} is outside 0..{self.num_classes - 1}; "
                    "set num_classes of the filter to the number of classes of the training set."
                )
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        finite = norm < torch.inf  # False for NaN, too
        return (rows / norm.clamp_min_(1e-12)).nan_to_num_(nan=0.0), finite.squeeze(1)

    def _class_scores(self, rows: Tensor) -> Tensor:
        """Log-scores ``s`` ``(B, C)``; classes without a centre are -inf unless they are to be counted."""
        with _full_precision(rows):
            if self.similarity == "avg":
                bias, slope = self.centers.new_zeros(()), self.centers
            else:
                centers = self.centers.double()
                rbar = torch.linalg.vector_norm(centers, dim=1)
                spread = rbar
                if self.shared_kappa:
                    rows_per_class = self.class_count.double()
                    mean_square = (rows_per_class * rbar**2).sum() / rows_per_class.sum().clamp_min(1)
                    spread = torch.where(self.filled, mean_square.sqrt(), 0.0)
                kappa = concentration(spread, self.embedding_dim, self.max_rbar)
                bias = log_normalizer(kappa, self.embedding_dim)
                slope = centers * (kappa / rbar.clamp_min(1e-12)).unsqueeze(1)
            if not self.count_empty_classes:
                bias = torch.where(self.filled, bias, -torch.inf)
            return torch.addmm(bias, rows.to(slope.dtype), slope.T)

    def _log_prob(self, rows: Tensor, known: Tensor, label: Tensor) -> Tensor:
        """``log P_clean`` ``(B,)`` in float64, NaN where not ``known``."""
        scores = self._class_scores(rows)
        column = label.unsqueeze(1)
        given = scores.gather(1, column).squeeze(1).double()
        if self.similarity == "avg":
            # |s| <= 1, so the exponential needs no shift; with two classes or more log P is below -0.12,
            # so hardshrink only makes the 0 of a single class exact
            log_prob = hardshrink(given - scores.exp_().sum(dim=1).double().log_(), 1e-3)
        else:
            # log-odds against all other classes first: 1 - P may be far below the float64 epsilon
            others = scores.scatter_(1, column, -torch.inf).logsumexp(dim=1)
            log_prob = -torch.logaddexp(others - given, torch.zeros_like(given))
        return log_prob.masked_fill_(~known, torch.nan)

    # -- decisions ----------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch and push its threshold into the window.

        Returns:
            Weights 0/1 and scores ``(B,)``; ``threshold`` is the ``log P_clean`` that had to be passed
            (NaN if none applied). ``stats``: ``unknown`` and ``nonfinite`` ``(B,)`` bool; ``quantile``,
            this batch's own ``log Q``, and ``fallback``, whether the plain TRM rule was used, both 0-d.
        """
        rows, finite = self._unit_rows(ctx)
        known = finite & self.filled[ctx.label]
        log_prob = self._log_prob(rows, known, ctx.label)
        remove, quantile = self._quantile(log_prob, known)
        if self.warmup_steps:
            quantile = quantile.masked_fill(self.steps < self.warmup_steps, torch.nan)
        self._push(quantile)
        # NaN compares false on either side: without a threshold or an opinion nothing is dropped
        applies = quantile <= 0
        threshold = torch.where(applies, self._window_threshold(), torch.nan)
        fallback = applies & ~(log_prob > threshold).any()
        drop = log_prob <= threshold
        if not (fallback.is_cpu and not fallback):  # only the CPU may look; a GPU would have to wait
            drop = torch.where(fallback, self._lowest(log_prob, ctx.index, remove), drop)
            threshold = torch.where(fallback, quantile, threshold)
            self.window_values[:-1].masked_fill_(fallback, torch.nan)
        stats = {
            "unknown": finite & ~known,
            "nonfinite": ~finite,
            "quantile": quantile.float(),
            "fallback": fallback,
        }
        return Selection((finite & ~drop).float(), log_prob.float(), threshold.float(), stats)

    @torch.no_grad()
    def select_scores(self, score: Tensor) -> Selection:
        """TRM on the scores ``(N,)`` of the whole training set: drops the ``int(noise_rate * n)`` lowest.

        ``n`` counts the samples with an opinion; NaN is kept. Ties are broken by position, and a sample
        of ``P_clean`` exactly 1 is never dropped. The window is neither used nor changed.
        """
        unknown = score.isnan()
        remove, quantile = self._quantile(score, ~unknown)
        drop = self._lowest(score, torch.arange(len(score), device=score.device), remove)
        return Selection((~drop).float(), score.float(), quantile.float(), {"unknown": unknown})

    def _quantile(self, log_prob: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """``r = int(R n)`` and ``log Q``, the ``r``-th smallest (NaN if ``r = 0``), both 0-d."""
        # a float64 product, truncated: the same integer as Python's int(R * n)
        remove = (known.sum(dtype=torch.float64) * self.noise_rate).long()
        # sort puts NaN last; the NaN in front serves r = 0
        padded = torch.cat([log_prob.new_full((1,), torch.nan), log_prob.sort().values])
        return remove, padded.take(remove)

    def _lowest(self, log_prob: Tensor, index: Tensor, remove: Tensor) -> Tensor:
        """Mask ``(B,)`` of the ``r`` lowest, ties by dataset index; never a row of ``P_clean = 1``."""
        by_index = index.argsort(stable=True)
        ordered, within = log_prob[by_index].sort(stable=True)
        place = torch.arange(len(index), device=index.device)
        lowest = (place < remove) & (ordered < 0)
        return torch.empty_like(lowest).index_copy_(0, by_index[within], lowest)

    def _push(self, quantile: Tensor) -> None:
        """Append ``log Q`` to the window, newest last, unless it is NaN or says ``P_clean = 1``."""
        shifted = torch.cat([self.window_values[1:], quantile.double().unsqueeze(0)])
        self.window_values.copy_(torch.where(quantile < 0, shifted, self.window_values))

    def _window_threshold(self) -> Tensor:
        """The smoothed threshold as ``log P_clean``, NaN (above nothing) while the window is empty."""
        values = self.window_values
        if self.similarity == "vmf":
            ordered = values.sort().values  # NaN last
            count = values.numel() - values.isnan().sum()
            place = torch.arange(values.numel(), device=values.device)
            middle = (place >= count // 4) & (place < count - count // 4)
            return torch.where(middle, ordered, 0.0).sum() / middle.sum()
        # shifted by the maximum, so that equal values (window = 1) come back bit for bit
        top = values.nan_to_num(nan=-torch.inf).amax()
        return (values - top).exp_().nanmean().log_() + top

    # -- memory -------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, ctx: FilterContext, selection: Selection) -> None:
        """Write the kept, finite rows into the ring, oldest rows first to go, and refresh their centres."""
        rows, finite = self._unit_rows(ctx)
        keep = selection.keep.to(rows.device) & finite
        chunks = (x.split(self.memory_size) for x in (rows, ctx.label, keep))
        for part in zip(*chunks, strict=True):
            self._write(*part)
        self.steps.add_(1)

    def _write(self, rows: Tensor, label: Tensor, keep: Tensor) -> None:
        """Ring write of at most ``M`` rows. Fixed shapes: dropped rows rewrite what is there already."""
        order = keep.byte().argsort(stable=True, descending=True)
        place = torch.arange(len(rows), device=rows.device)
        kept = keep.sum()
        fresh = place < kept
        slot = (self.pointer + place).remainder_(self.memory_size)
        old, old_label = self.memory.index_select(0, slot), self.memory_label.index_select(0, slot)
        new = rows.index_select(0, order).mul_(_GRID).round_().div_(_GRID)
        new = torch.where(fresh.unsqueeze(1), new, old)
        new_label = torch.where(fresh, label.index_select(0, order), old_label)
        self.memory.index_copy_(0, slot, new)
        self.memory_label.index_copy_(0, slot, new_label)
        self.pointer.add_(kept).remainder_(self.memory_size)
        self.count.add_(kept).clamp_max_(self.memory_size)

        labels = torch.cat([old_label, new_label])
        sign = (labels >= 0).long()  # an empty row is zero and counts 0, whatever class we put it in
        sign[: len(rows)].neg_()
        classes = labels.clamp_min_(0)
        self.class_sum.index_add_(0, classes, torch.cat([-old, new]).double())
        self.class_count.index_add_(0, classes, sign)
        self._refresh(classes)

    def _refresh(self, classes: Tensor) -> None:
        """Recompute the centres of these classes from the running sums; repeats are harmless."""
        rows = self.class_count.index_select(0, classes)
        mean = self.class_sum.index_select(0, classes).div_(rows.clamp_min(1).unsqueeze(1))
        self.centers.index_copy_(0, classes, mean.float())
        self.filled.index_copy_(0, classes, rows > 0)

    @torch.no_grad()
    def rebuild(self) -> None:
        """Recompute sums and centres from the memory; needed only after editing the memory by hand."""
        used = self.memory_label >= 0
        classes = self.memory_label.clamp_min(0)
        self.class_sum.zero_().index_add_(0, classes, self.memory.double() * used.unsqueeze(1))
        self.class_count.zero_().index_add_(0, classes, used.long())
        self._refresh(torch.arange(self.num_classes, device=classes.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PRISM:
        """Move between devices but keep dtypes: ``.bfloat16()`` on the model must not blur the state."""

        def keep_dtype(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype is x.dtype else x.to(y.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, "
            f"noise_rate={self.noise_rate}, memory_size={self.memory_size}, window={self.window}, "
            f"similarity={self.similarity!r}, warmup_steps={self.warmup_steps}, "
            f"count_empty_classes={self.count_empty_classes}, shared_kappa={self.shared_kappa}"
        )


def _full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off around a product, at no cost where it is off already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
