"""PRISM: keep the samples whose given label agrees with the features of earlier batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.vmf import concentration, log_normalizer
from lightning_nrml.types import FilterContext, Selection

# Class sums are kept as int64 multiples of 2^-38. Adding a row and subtracting it again is then exact:
# sums never drift, do not depend on the order of additions (so they are equal on all ranks), and equal
# rebuilt ones bit for bit. A class of 2^24 unit rows still fits.
_FIXED_POINT = 2.0**38
_MAX_MEMORY = 2**24


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
        * The mean is taken over probabilities for ``"avg"``, as in the official code. vMF posteriors span
          hundreds of nats, where one outlier rules either mean: ``"vmf"`` takes the median.
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

    Attributes:
        memory: ``(M, D)`` float32 unit rows. memory_label: ``(M,)`` int64, -1 = empty.
        centers: ``(C, D)`` float32, zero without rows. filled: ``(C,)`` bool, has a centre.
        class_sum: ``(C, D)`` int64 in units of 2^-38. class_count: ``(C,)`` rows per class.
        window_values: ``(window,)`` float64, last thresholds as ``log P_clean``, NaN = empty.
        pointer, count, window_pointer, steps: 0-d int64: next row, rows in use, next window slot, updates.

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
    window_pointer: Tensor
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
        self.register_buffer("memory", torch.zeros(memory_size, embedding_dim))
        self.register_buffer("memory_label", torch.full((memory_size,), -1))
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("class_sum", torch.zeros(num_classes, embedding_dim, dtype=torch.int64))
        self.register_buffer("class_count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("window_values", torch.full((window,), torch.nan, dtype=torch.float64))
        for name in ("pointer", "count", "window_pointer", "steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    # -- scores -------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` float32 ``log P_clean``; NaN where the class has no centre or the row is not finite."""
        rows, finite = self._unit_rows(ctx)
        return self._log_prob(rows, finite, ctx.label).float()

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
        finite = norm.isfinite()
        return torch.where(finite, rows / norm.clamp_min(1e-12), 0.0), finite.squeeze(1)

    def _class_scores(self, rows: Tensor) -> Tensor:
        """Log-scores ``s`` ``(B, C)``; classes without a centre are -inf unless they are to be counted."""
        with _full_precision(rows):
            if self.similarity == "avg":
                bias = torch.zeros_like(self.centers[:, 0])
                slope = self.centers
            else:
                centers = self.centers.double()
                rbar = torch.linalg.vector_norm(centers, dim=1)
                kappa = concentration(rbar, self.embedding_dim, self.max_rbar)
                bias = log_normalizer(kappa, self.embedding_dim)
                slope = centers * (kappa / rbar.clamp_min(1e-12)).unsqueeze(1)
            if not self.count_empty_classes:
                bias = bias.masked_fill(~self.filled, -torch.inf)
            return torch.addmm(bias, rows.to(slope.dtype), slope.T)

    def _log_prob(self, rows: Tensor, finite: Tensor, label: Tensor) -> Tensor:
        """``log P_clean`` ``(B,)`` in float64, NaN without an opinion."""
        scores = self._class_scores(rows)
        given = scores.gather(1, label.unsqueeze(1)).squeeze(1).double()
        if self.similarity == "avg":
            # |s| <= 1: the exponential needs no shift by the maximum
            log_prob = given - scores.exp_().sum(dim=1).double().log()
            log_prob = log_prob.clamp_max(0.0)
        else:
            # log-odds against all other classes first: 1 - P may be far below the float64 epsilon
            others = scores.scatter_(1, label.unsqueeze(1), -torch.inf).logsumexp(dim=1)
            log_prob = -torch.logaddexp(others - given, torch.zeros_like(given))
        return log_prob.masked_fill(~(finite & self.filled[label]), torch.nan)

    # -- decisions ----------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch and push its threshold into the window.

        Returns:
            Weights 0/1 and scores ``(B,)``; ``threshold`` is the ``log P_clean`` that had to be passed
            (NaN if none applied). ``stats``: ``unknown`` and ``nonfinite`` ``(B,)`` bool, ``quantile``
            this batch's own ``log Q``, ``fallback`` whether the plain TRM rule was used, ``filled`` the
            share of classes with a centre (all 0-d).
        """
        rows, finite = self._unit_rows(ctx)
        log_prob = self._log_prob(rows, finite, ctx.label)
        known = ~log_prob.isnan()
        ranked_out, quantile, applies = self._rank(log_prob, ctx.index)
        applies = applies & (self.steps >= self.warmup_steps)
        self._push(quantile, applies & (quantile < 0))
        mean = self._window_threshold()
        above = known & (log_prob > mean)
        fallback = applies & ~above.any()
        self._cut_window(fallback)
        drop = torch.where(fallback, ranked_out, known & ~above) & applies
        threshold = torch.where(fallback, quantile, mean).masked_fill(~applies, torch.nan)
        stats = {
            "unknown": finite & ~known,
            "nonfinite": ~finite,
            "quantile": quantile.float(),
            "fallback": fallback,
            "filled": self.filled.float().mean(),
        }
        return Selection((finite & ~drop).float(), log_prob.float(), threshold.float(), stats)

    @torch.no_grad()
    def select_scores(self, score: Tensor) -> Selection:
        """TRM on the scores ``(N,)`` of the whole training set: drops the ``int(noise_rate * n)`` lowest.

        ``n`` counts the samples with an opinion; NaN is kept. Ties are broken by position, and a sample
        of ``P_clean`` exactly 1 is never dropped. The window is neither used nor changed.
        """
        drop, quantile, applies = self._rank(score, torch.arange(len(score), device=score.device))
        threshold = quantile.masked_fill(~applies, torch.nan).float()
        return Selection((~drop).float(), score.float(), threshold, {"unknown": score.isnan()})

    def _rank(self, log_prob: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ``r = int(R n)`` lowest as a mask ``(B,)``, ``log Q`` (NaN if ``r = 0``), and ``r > 0``."""
        known = ~log_prob.isnan()
        value = torch.where(known, log_prob, torch.inf)
        by_index = index.argsort(stable=True)
        ordered, within = value[by_index].sort(stable=True)
        rank = torch.empty_like(index)
        rank[by_index[within]] = torch.arange(len(index), device=index.device)
        # float64 product, truncated: the same integer as Python's int(R * n)
        remove = (known.sum().double() * self.noise_rate).long()
        applies = remove > 0
        if len(index) == 0:
            return known, torch.full_like(log_prob.sum(), torch.nan), applies
        quantile = ordered[(remove - 1).clamp_min(0)].masked_fill(~applies, torch.nan)
        return (rank < remove) & (value < 0), quantile, applies

    def _push(self, quantile: Tensor, wanted: Tensor) -> None:
        """Append ``log Q`` to the window if ``wanted``, without asking the device."""
        slot = self.window_pointer.unsqueeze(0)
        old = self.window_values.index_select(0, slot)
        self.window_values.index_copy_(0, slot, torch.where(wanted, quantile.double(), old))
        self.window_pointer.copy_((self.window_pointer + wanted) % self.window)

    def _cut_window(self, wanted: Tensor) -> None:
        """Forget all but the last threshold if ``wanted``."""
        last = (self.window_pointer - 1) % self.window
        older = torch.arange(self.window, device=last.device) != last
        self.window_values.masked_fill_(older & wanted, torch.nan)

    def _window_threshold(self) -> Tensor:
        """The smoothed threshold as ``log P_clean``, NaN (above nothing) while the window is empty."""
        values = self.window_values
        if self.similarity == "vmf":
            return values.nanmedian()
        valid = ~values.isnan()
        # shifted by the maximum, so that equal values (window = 1) come back bit for bit
        top = torch.where(valid, values, -torch.inf).amax()
        return top + (torch.where(valid, (values - top).exp(), 0.0).sum() / valid.sum()).log()

    # -- memory -------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, ctx: FilterContext, selection: Selection) -> None:
        """Write the kept, finite rows into the ring, oldest rows first to go, and refresh their centres."""
        rows, finite = self._unit_rows(ctx)
        keep = selection.keep.to(rows.device) & finite
        for start in range(0, len(rows), self.memory_size):
            part = slice(start, start + self.memory_size)
            self._write(rows[part], ctx.label[part], keep[part])
        self.steps.add_(1)

    def _write(self, rows: Tensor, label: Tensor, keep: Tensor) -> None:
        """Ring write of at most ``M`` rows. Fixed shapes: dropped rows rewrite what is there already."""
        order = keep.byte().argsort(stable=True, descending=True)
        place = torch.arange(len(rows), device=rows.device)
        kept = keep.sum()
        fresh = place < kept
        slot = (self.pointer + place) % self.memory_size
        old, old_label = self.memory[slot], self.memory_label[slot]
        new = torch.where(fresh.unsqueeze(1), rows[order], old)
        new_label = torch.where(fresh, label[order], old_label)
        self.memory.index_copy_(0, slot, new)
        self.memory_label.index_copy_(0, slot, new_label)
        self.pointer.copy_((self.pointer + kept) % self.memory_size)
        self.count.copy_((self.count + kept).clamp_max(self.memory_size))

        labels = torch.cat([old_label, new_label])
        one = (labels >= 0).long()
        one[: len(rows)].neg_()
        classes = labels.clamp_min(0)  # empty rows are zero and count 0, whatever the class
        self.class_sum.index_add_(0, classes, torch.cat([-_fixed(old), _fixed(new)]))
        self.class_count.index_add_(0, classes, one)
        self._refresh(classes)

    def _refresh(self, classes: Tensor) -> None:
        """Recompute the centres of these classes from the running sums; repeats are harmless."""
        rows = self.class_count[classes]
        mean = self.class_sum[classes].double() / (rows.clamp_min(1) * _FIXED_POINT).unsqueeze(1)
        self.centers.index_copy_(0, classes, mean.float())
        self.filled.index_copy_(0, classes, rows > 0)

    @torch.no_grad()
    def rebuild(self) -> None:
        """Recompute sums and centres from the memory; needed only after editing the memory by hand."""
        used = self.memory_label >= 0
        classes = self.memory_label.clamp_min(0)
        self.class_sum.zero_().index_add_(0, classes, _fixed(self.memory) * used.unsqueeze(1))
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
            f"count_empty_classes={self.count_empty_classes}"
        )


def _fixed(rows: Tensor) -> Tensor:
    """Unit rows as int64 multiples of 2^-38 (the float32 product is exact)."""
    return (rows * _FIXED_POINT).long()


def _full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off around a product, at no cost where it is off already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
