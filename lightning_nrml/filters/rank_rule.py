"""PRISM's threshold: drop the least probable share of a batch, smoothed over the last batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Decision(NamedTuple):
    """What the rule says about a batch of ``B`` rows.

    Args:
        drop: ``(B,)`` bool.
        threshold: 0-d, the ``log P_clean`` that had to be passed; NaN if none applied.
        quantile: 0-d, the batch's own ``log Q``; NaN if it says nothing.
        fallback: 0-d bool, whether the plain TRM rule was used.
    """

    drop: Tensor
    threshold: Tensor
    quantile: Tensor
    fallback: Tensor


def rank_rule(
    log_prob: Tensor,
    index: Tensor,
    window: Tensor,
    noise_rate: float,
    robust: bool = False,
    active: Tensor | None = None,
) -> Decision:
    """sTRM of PRISM, Liu et al., CVPR 2021 (arXiv 2103.16047, section 3.2).

    ``Q`` is the ``r``-th smallest ``P_clean`` of the batch, ``r = int(noise_rate * n)`` of the ``n`` rows
    with an opinion. It is pushed into the window, unless it is 1 or there is none; rows that are not above
    the mean of the window are dropped. If none is above it, exactly the ``r`` lowest are dropped, and the
    window is cut to its last value.

    Args:
        log_prob: ``(B,)`` log-probabilities, NaN = no opinion: kept.
        index: ``(B,)`` dataset positions, which break ties in the fallback.
        window: ``(W,)`` float64 values of ``log Q``, newest last, NaN = empty; changed in place.
        noise_rate: in [0, 1).
        robust: take the mean of the middle half of ``log Q``; else the log of the mean of ``Q``.
        active: 0-d bool, False = decide nothing and push nothing; ``None`` = True.
    """
    # The same rule twice: a GPU must not be waited for, and on a CPU thirty calls of torch on single numbers
    # would be a tenth of the filter's time.
    decide = _on_host if log_prob.is_cpu else _on_device
    return decide(log_prob, index, window, noise_rate, robust, active)


def quantile(log_prob: Tensor, noise_rate: float) -> tuple[Tensor, Tensor]:
    """``r = int(noise_rate * n)`` and ``log Q``, the ``r``-th smallest (NaN if ``r = 0``), both 0-d."""
    # a float64 product, truncated: the same integer as Python's int(R * n)
    remove = ((~log_prob.isnan()).sum(dtype=torch.float64) * noise_rate).long()
    # sort puts NaN last; the NaN in front serves r = 0
    padded = torch.cat([log_prob.new_full((1,), torch.nan), log_prob.sort().values])
    return remove, padded.take(remove)


def lowest(log_prob: Tensor, index: Tensor, remove: Tensor | int) -> Tensor:
    """Mask ``(B,)`` of the ``remove`` lowest, ties by dataset index; never a row of ``P_clean = 1``."""
    by_index = index.argsort(stable=True)
    ordered, within = log_prob[by_index].sort(stable=True)
    place = torch.arange(len(index), device=index.device)
    chosen = (place < remove) & (ordered < 0)
    return torch.empty_like(chosen).index_copy_(0, by_index[within], chosen)


def _on_device(
    log_prob: Tensor, index: Tensor, window: Tensor, noise_rate: float, robust: bool, active: Tensor | None
) -> Decision:
    remove, own = quantile(log_prob, noise_rate)
    if active is not None:
        own = torch.where(active, own, torch.nan)
    torch.where(own < 0, torch.cat([window[1:], own.unsqueeze(0)]), window, out=window)
    mean = (_middle_mean if robust else _log_mean)(window, own)
    # NaN compares false on either side: without a threshold or an opinion nothing is dropped
    fallback = (own <= 0) & ~(log_prob > mean).any()
    drop = torch.where(fallback, lowest(log_prob, index, remove), log_prob <= mean)
    window[:-1].masked_fill_(fallback, torch.nan)
    return Decision(drop, torch.where(fallback, own, mean), own, fallback)


def _log_mean(window: Tensor, own: Tensor) -> Tensor:
    """``log`` of the mean of ``Q``; NaN (above nothing) if the window is empty or ``own`` is NaN."""
    # measured from the highest value, so that equal ones (a window of 1) come back bit for bit
    top = window.nan_to_num(nan=-torch.inf).amax()
    return torch.where(own.isnan(), torch.nan, (window - top).exp_().nanmean().log_() + top)


def _middle_mean(window: Tensor, own: Tensor) -> Tensor:
    """Mean of the middle half of ``log Q``; NaN as above."""
    ordered = window.sort().values  # NaN last
    count = window.numel() - window.isnan().sum()
    place = torch.arange(window.numel(), device=window.device)
    middle = (place >= count // 4) & (place < count - count // 4)
    mean = torch.where(middle, ordered, 0.0).sum() / middle.sum()
    return torch.where(own.isnan(), torch.nan, mean)


def _on_host(
    log_prob: Tensor, index: Tensor, window: Tensor, noise_rate: float, robust: bool, active: Tensor | None
) -> Decision:
    ordered = log_prob.tolist()
    if math.isnan(sum(ordered)):
        ordered = [p for p in ordered if p == p]
    ordered.sort()
    remove = int(len(ordered) * noise_rate)
    own = mean = math.nan
    if remove and (active is None or active):
        own = ordered[remove - 1]
        values = window.numpy()
        if own < 0:
            values[:-1] = values[1:]
            values[-1] = own
        known = [q for q in values.tolist() if q == q]
        if known:
            mean = _host_mean(known, robust)
    # in the type of the scores, as all comparisons are; scalar_tensor takes a third of tensor's time
    level = torch.scalar_tensor(mean, dtype=log_prob.dtype, device="cpu")
    quantile = torch.scalar_tensor(own, dtype=log_prob.dtype, device="cpu")
    none_above = own <= 0 and not ordered[-1] > float(level)
    fallback = torch.scalar_tensor(none_above, dtype=torch.bool, device="cpu")
    if not none_above:
        return Decision(log_prob <= level, level, quantile, fallback)
    window[:-1] = torch.nan
    return Decision(lowest(log_prob, index, remove), quantile, quantile, fallback)


def _host_mean(window: list[float], robust: bool) -> float:
    if not robust:
        top = max(window)
        return math.log(sum(math.exp(q - top) for q in window) / len(window)) + top
    outer = len(window) // 4
    middle = sorted(window)[outer : len(window) - outer]
    return sum(middle) / len(middle)
