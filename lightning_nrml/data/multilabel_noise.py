"""Noise on ``(N, L)`` labels: missing ones, extra ones, both. Pure functions, as in :mod:`.noise`.

Which entries are wrong depends on the seed and on each column alone, not on other classes; for one seed
the flips of a low rate are among those of a higher one (``multilabel_images``: for its images only).

Sources: Burgert, Ravanbakhsh, Demir, "On the Effects of Different Types of Label Noise in Multi-Label Remote
Sensing Image Classification", IEEE TGRS 2022, arXiv 2207.13975, for ``multilabel`` and
``multilabel_uniform``; IDMN (instance-dependent multi-label noise), IEEE JSTARS 2024, code by ``youngwk``,
for ``multilabel_scores``; Aksoy, Ravanbakhsh, Demir, "Multi-Label Noise Robust Collaborative Learning for
Remote Sensing Image Classification", IEEE TNNLS 2022, arXiv 2012.10715, for ``multilabel_images``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_nrml.data.noise_types import (
    MULTILABEL_KINDS,
    NoiseConfig,
    NoisyLabels,
    check_rate,
    uniform,
)

#: no class is made more frequent than this by added labels
CAP = 0.95


def multilabel(
    target: ArrayLike | Tensor,
    subtractive: float | ArrayLike = 0.0,
    additive: float | ArrayLike = 0.0,
    seed: int = 0,
    cap: float = CAP,
) -> NoisyLabels:
    """In each class of n positives, remove ``int(subtractive * n)`` of them and add ``int(additive * n)``.

    The numbers are exact, the positions are drawn without replacement from the *clean* column, so that an
    added label is never removed again. The number of false positives follows the size of the class, not the
    number of its negatives: at 40 % additive noise on UC Merced 7.7 % of the entries are wrong. ``int`` cuts,
    so a class of 4 positives stays clean at a rate of .2. Images may lose all of their labels.

    Args:
        target: ``(N, L)`` clean labels, 0 or 1.
        subtractive: share of the positives that get lost, in [0, 1]; one number, or ``(L,)``.
        additive: number of false positives over n, in [0, 1]; one number, or ``(L,)``.
        seed: not negative.
        cap: prevalence in [0, 1] that added labels do not pass (clean positives count as kept).

    Returns:
        ``NoisyLabels`` of ``(N, L)`` arrays with ``is_noise == (label != clean_label)``.

    Raises:
        ValueError: a label is neither 0 nor 1, or a rate, the cap or the seed is out of range.
    """
    check_rate("cap", cap)
    clean = checked_target(target)
    rates = [
        _class_rates(n, r, clean.shape[1]) for n, r in (("subtractive", subtractive), ("additive", additive))
    ]
    key = uniform(seed, clean.shape[1], len(clean))
    is_noise = np.zeros(clean.shape, dtype=bool)
    most = int(cap * len(clean))
    for c, (remove, add) in enumerate(zip(*rates, strict=True)):
        order = np.argsort(key[c], kind="stable")
        positive = clean[order, c] == 1
        count = int(positive.sum())
        is_noise[order[positive][: int(remove * count)], c] = True
        is_noise[order[~positive][: max(0, min(int(add * count), most - count))], c] = True
    return _flipped(clean, is_noise)


def multilabel_uniform(target: ArrayLike | Tensor, rate: float, seed: int = 0) -> NoisyLabels:
    """Every entry flips with the same probability, whatever it is; rare classes drown in false positives.

    Args:
        target: ``(N, L)`` clean labels, 0 or 1.
        rate: in [0, 1].
        seed: not negative.

    Returns:
        ``NoisyLabels`` of ``(N, L)`` arrays with ``is_noise == (label != clean_label)``.

    Raises:
        ValueError: a label is neither 0 nor 1, or the rate or the seed is out of range.
    """
    check_rate("rate", rate)
    clean = checked_target(target)
    return _flipped(clean, rate > uniform(seed, clean.shape[1], len(clean)).T)


def multilabel_images(target: ArrayLike | Tensor, rate: float, seed: int = 0) -> NoisyLabels:
    """RCML's noise: ``int(N * rate)`` images, in each of which ``int(L * rate)`` labels are flipped.

    A label is flipped whether it is present or absent, so most flips add labels.

    Args:
        target: ``(N, L)`` clean labels, 0 or 1.
        rate: in [0, 1].
        seed: not negative.

    Returns:
        ``NoisyLabels`` of ``(N, L)`` arrays with ``is_noise == (label != clean_label)``.

    Raises:
        ValueError: a label is neither 0 nor 1, or the rate or the seed is out of range.
    """
    check_rate("rate", rate)
    clean = checked_target(target)
    rows, labels = clean.shape
    key = uniform(seed, labels + 1, rows)
    images = np.argsort(key[0], kind="stable")[: int(rows * rate)]
    positions = np.argsort(key[1:, images], axis=0, kind="stable")[: int(labels * rate)]
    is_noise = np.zeros(clean.shape, dtype=bool)
    is_noise[images, positions] = True
    return _flipped(clean, is_noise)


def multilabel_scores(
    target: ArrayLike | Tensor,
    scores: ArrayLike | Tensor,
    rate: float,
    additive_rate: float | None = None,
) -> NoisyLabels:
    """Labels that an image does not look like get lost, labels that it looks like are added.

    Two thresholds from the scores of all positives: those below their ``rate`` quantile are removed, and
    negatives above their ``1 - additive_rate`` quantile are added. So the share of lost positives is
    ``rate``; how many are added is up to the scores. Nothing is drawn.

    Args:
        target: ``(N, L)`` clean labels, 0 or 1.
        scores: ``(N, L)`` finite numbers, high where an image looks like a label, such as the zero-shot
            logits of an image-text model.
        rate: in [0, 1]; 0 removes nothing.
        additive_rate: in [0, 1]; 0 adds nothing; ``None`` = ``rate``.

    Returns:
        ``NoisyLabels`` of ``(N, L)`` arrays with ``is_noise == (label != clean_label)``.

    Raises:
        ValueError: a label is neither 0 nor 1, a rate is out of range, no label is positive, or the scores
            have another shape or are not finite.
    """
    additive = rate if additive_rate is None else additive_rate
    check_rate("rate", rate)
    check_rate("additive_rate", additive)
    clean = checked_target(target)
    score = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else np.asarray(scores)
    if score.shape != clean.shape:
        raise ValueError(f"scores must have the shape of the labels, {clean.shape}, got {score.shape}")
    score = score.astype(np.float64)
    if not np.isfinite(score).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(score))[0])
        raise ValueError(f"score of sample {row}, label {column} is {score[row, column]}; it must be finite")
    positive = clean == 1
    if not positive.any():
        raise ValueError("no label is positive, so there are no scores to set thresholds by")
    is_noise = positive & (score < np.quantile(score[positive], rate))
    if additive > 0:  # else negatives above all positives would still be added
        is_noise |= ~positive & (score > np.quantile(score[positive], 1 - additive))
    return _flipped(clean, is_noise)


def apply_multilabel_noise(
    target: ArrayLike | Tensor,
    config: NoiseConfig,
    names: Sequence[str] = (),
    scores: ArrayLike | None = None,
) -> NoisyLabels:
    """The noise that ``config.kind`` names, on ``(N, L)`` labels; files are the datamodule's business.

    Args:
        target: ``(N, L)`` clean labels, 0 or 1.
        config: the noise.
        names: L names of labels, for ``config.class_rates``.
        scores: ``(N, L)``, what ``config.scores`` holds.

    Raises:
        ValueError: the kind is one for single labels, the labels are not 0 and 1, or a rate is for a label
            that there is not.
    """
    if config.kind == "none":
        return multilabel(target)
    if config.kind == "uniform":
        return multilabel_uniform(target, config.rate, config.seed)
    if config.kind == "images":
        return multilabel_images(target, config.rate, config.seed)
    if config.kind not in MULTILABEL_KINDS:
        raise ValueError(
            f"noise.kind '{config.kind}' is for one class per sample, but this set has several labels per "
            f"sample: use {', '.join(MULTILABEL_KINDS)} or none"
        )
    if config.kind == "scores":
        return multilabel_scores(target, () if scores is None else scores, config.rate, config.additive_rate)
    clean = checked_target(target)
    rates = _named_rates(np.full(clean.shape[1], config.rate), config.class_rates, names)
    add = rates if config.additive_rate is None else np.full(clean.shape[1], config.additive_rate)
    add = _named_rates(add, config.class_additive_rates, names)
    remove = 0.0 if config.kind == "additive" else rates
    return multilabel(clean, remove, 0.0 if config.kind == "subtractive" else add, config.seed)


def _named_rates(rates: np.ndarray, changes: Mapping[str, float] | None, names: Sequence[str]) -> np.ndarray:
    """``(L,)`` rates with some replaced by label name."""
    rates = rates.copy()
    for name, rate in (changes or {}).items():
        if name not in names:
            raise ValueError(f"noise rates: there is no label '{name}'; the labels are {', '.join(names)}")
        rates[list(names).index(name)] = rate
    return rates


def checked_target(target: ArrayLike | Tensor) -> np.ndarray:
    """A fresh ``(N, L)`` int64 copy of labels that are 0 or 1.

    Raises:
        ValueError: another shape, or the first entry that is neither.
    """
    raw = target.detach().cpu().numpy() if isinstance(target, Tensor) else np.asarray(target)
    if raw.ndim != 2:
        raise ValueError(f"target must have shape (N, L), a column for every label, got {raw.shape}")
    if raw.dtype.kind not in "biuf":
        raise ValueError(f"target must hold 0 and 1, got dtype {raw.dtype}")
    bad = (raw != 0) & (raw != 1)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"target of sample {row}, label {column} is {raw[row, column]}; accepted are 0 and 1"
        )
    return raw.astype(np.int64)


def _class_rates(name: str, rate: float | ArrayLike, num_labels: int) -> np.ndarray:
    rates = np.asarray(rate, dtype=np.float64)
    if rates.shape not in ((), (num_labels,)):
        raise ValueError(
            f"{name} must be one number, or one for each of {num_labels} labels, got shape {rates.shape}"
        )
    bad = ~((rates >= 0) & (rates <= 1))
    if bad.any():
        raise ValueError(
            f"{name} must lie in [0, 1], got {rates[bad].flat[0] if rates.ndim else float(rates)}"
        )
    return np.broadcast_to(rates, (num_labels,))


def _flipped(clean: np.ndarray, is_noise: np.ndarray) -> NoisyLabels:
    return NoisyLabels(np.where(is_noise, 1 - clean, clean), clean, is_noise.copy())
