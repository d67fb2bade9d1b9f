"""Label noise: pure functions from clean labels to noisy ones.

Every function is deterministic in ``seed`` and uses no global random state, so all ranks, workers and
resumed runs get the same labels. Random numbers are raw PCG64 bits, whose stream NumPy keeps stable
across releases: a seed names the same noisy labels for ever. For one seed, the samples that are wrong at
a low rate are also wrong at a higher one.

Noise belongs on training labels only. Sources: PRISM (Liu et al., CVPR 2021, "Noise-resistant Deep Metric
Learning with Ranking-based Instance Selection") for ``symmetric`` and ``small_cluster``; BARE (Patel &
Sastry, WACV 2023, "Adaptive Sample Selection for Robust Learning under Label Noise") for ``asymmetric``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_nrml.data.multilabel_noise import (
    multilabel,
    multilabel_images,
    multilabel_scores,
    multilabel_uniform,
)
from lightning_nrml.data.noise_types import (
    MULTILABEL_KINDS,
    NoiseConfig,
    NoiseKind,
    NoisyLabels,
    by_number,
    check_rate,
    check_seed,
    uniform,
)
from lightning_nrml.data.tables import match_rows, read_label_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "NoiseConfig",
    "NoiseKind",
    "NoisyLabels",
    "apply_noise",
    "asymmetric",
    "label_hash",
    "multilabel",
    "multilabel_images",
    "multilabel_scores",
    "multilabel_uniform",
    "pair_flip",
    "renumbering",
    "small_cluster",
    "symmetric",
]


def _checked_label(label: ArrayLike | Tensor, num_classes: int | None, lowest: int = 0) -> np.ndarray:
    """A fresh ``(N,)`` int64 copy in ``[lowest, num_classes)``."""
    if isinstance(label, Tensor):
        label = label.detach().cpu().numpy()
    raw = np.asarray(label)
    if raw.ndim != 1:
        raise ValueError(f"label must have shape (N,), one class per sample, got {raw.shape}")
    if raw.dtype.kind not in "iuf":
        raise ValueError(f"label must hold class ids (integers), got dtype {raw.dtype}")
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(raw) | (raw != np.floor(raw)) | (raw < lowest)
        if num_classes is not None:
            bad |= raw >= num_classes
    if bad.any():
        row = int(np.argmax(bad))
        limit = f"at least {lowest}" if num_classes is None else f"in [{lowest}, {num_classes - 1}]"
        raise ValueError(f"label of sample {row} is {raw[row]}; class ids must be whole numbers {limit}")
    return raw.astype(np.int64)


def _check_num_classes(num_classes: int, kind: str) -> None:
    if num_classes < 2:
        raise ValueError(
            f"{kind} noise needs at least 2 classes to flip between, got num_classes={num_classes}"
        )


def _flipped(clean: np.ndarray, wrong: np.ndarray, coin: np.ndarray, rate: float) -> NoisyLabels:
    is_noise = (coin < rate) & (wrong != clean)
    return NoisyLabels(np.where(is_noise, wrong, clean), clean, is_noise)


def symmetric(label: ArrayLike | Tensor, rate: float, num_classes: int, seed: int = 0) -> NoisyLabels:
    """Each sample, with probability ``rate``, gets a label drawn uniformly from the *other* classes.

    A coin per sample, not an exact count: the realised rate spreads as a binomial. Drawing from all classes
    instead would give an effective rate of ``rate * (C - 1) / C``.

    Args:
        label: ``(N,)`` clean class ids in ``[0, num_classes)``.
        rate: in [0, 1].
        num_classes: C, at least 2.
        seed: not negative.

    Returns:
        ``NoisyLabels`` with ``is_noise == (label != clean_label)``.

    Raises:
        ValueError: a label, the rate, the seed or the number of classes is out of range.
    """
    check_rate("rate", rate)
    _check_num_classes(num_classes, "symmetric")
    clean = _checked_label(label, num_classes)
    coin, target = uniform(seed, 2, len(clean))
    wrong = np.minimum((target * (num_classes - 1)).astype(np.int64), num_classes - 2)
    wrong += wrong >= clean  # skips the sample's own class
    return _flipped(clean, wrong, coin, rate)


def asymmetric(
    label: ArrayLike | Tensor,
    rate: float,
    mapping: Mapping[int, int],
    seed: int = 0,
    num_classes: int | None = None,
) -> NoisyLabels:
    """Each sample of a class in ``mapping`` flips to the mapped class with probability ``rate``.

    Other classes stay clean, so the overall rate is lower: ``rate`` times the share of samples in the mapped
    classes. From ``rate`` 0.5 on, the mapped class is the majority within its source class and the clean
    labels can no longer be told. BARE uses 7->1, 2->7, 3->8, 5<->6 on MNIST and 9->1, 2->0, 3<->5, 4->7 on
    CIFAR-10.

    Args:
        label: ``(N,)`` clean class ids.
        rate: in [0, 1], within the mapped classes.
        mapping: wrong class by right class.
        seed: not negative.
        num_classes: C; default: the largest label + 1.

    Returns:
        ``NoisyLabels`` with ``is_noise == (label != clean_label)``.

    Raises:
        ValueError: a label, the rate or the seed is out of range, or ``mapping`` is empty, names an unknown
            class or maps a class to itself.
    """
    check_rate("rate", rate)
    clean = _checked_label(label, num_classes)
    classes = num_classes if num_classes is not None else int(clean.max(initial=-1)) + 1
    if not mapping:
        raise ValueError("asymmetric noise needs a mapping from right to wrong class, such as {7: 1, 2: 7}")
    table = np.arange(classes)
    for source, target in mapping.items():
        if not (0 <= source < classes and 0 <= target < classes):
            raise ValueError(
                f"mapping {source}: {target} names an unknown class; class ids are 0 to {classes - 1}"
            )
        if source == target:
            raise ValueError(f"mapping {source}: {target} keeps the class; leave it out to keep it clean")
        table[source] = target
    (coin,) = uniform(seed, 1, len(clean))
    return _flipped(clean, table[clean], coin, rate)


def pair_flip(label: ArrayLike | Tensor, rate: float, num_classes: int, seed: int = 0) -> NoisyLabels:
    """Each sample flips to the next class, ``(c + 1) mod C``, with probability ``rate``.

    Args:
        label: ``(N,)`` clean class ids in ``[0, num_classes)``.
        rate: in [0, 1]; from 0.5 on, the wrong class is the majority.
        num_classes: C, at least 2.
        seed: not negative.

    Returns:
        ``NoisyLabels`` with ``is_noise == (label != clean_label)``.

    Raises:
        ValueError: a label, the rate, the seed or the number of classes is out of range.
    """
    check_rate("rate", rate)
    _check_num_classes(num_classes, "pair_flip")
    clean = _checked_label(label, num_classes)
    (coin,) = uniform(seed, 1, len(clean))
    return _flipped(clean, (clean + 1) % num_classes, coin, rate)


def _clusters(rows: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Cluster id from 0 per row, by Lloyd's k-means with ``k = ceil(n / 2)`` from k rows as starts.

    Own code, because a class has few images but there may be thousands of classes: a call of scikit-learn
    or faiss costs milliseconds of thread start-up, minutes in all on SOP's 11,318 classes.
    """
    centers = rows[np.argsort(draw, kind="stable")[: math.ceil(len(rows) / 2)]]
    cluster = np.full(len(rows), -1)
    for _ in range(100):
        # squared distance up to the row's own norm, which does not change its nearest centre
        nearest = ((centers**2).sum(axis=1) - 2 * rows @ centers.T).argmin(axis=1)
        if (nearest == cluster).all():
            break
        cluster = nearest
        member = (cluster == np.arange(len(centers))[:, None]).astype(np.float64)
        count = member.sum(axis=1, keepdims=True)
        centers = np.where(count > 0, member @ rows / np.maximum(count, 1), centers)
    return np.unique(cluster, return_inverse=True)[1]


def _checked_embedding(embedding: ArrayLike | Tensor | None, num_samples: int) -> np.ndarray:
    if embedding is None:
        raise ValueError(
            "small_cluster noise needs an embedding of the training set, shape (N, D), "
            "such as frozen backbone features or flattened pixels"
        )
    if isinstance(embedding, Tensor):
        embedding = embedding.detach().float().cpu().numpy()
    rows = np.asarray(embedding, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != num_samples:
        raise ValueError(f"embedding must have shape (N, D) with N = {num_samples} labels, got {rows.shape}")
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise ValueError(f"embedding of sample {int(np.argmax(bad))} holds NaN or infinity")
    return rows


def small_cluster(
    label: ArrayLike | Tensor, embedding: ArrayLike | Tensor | None, fraction: float, seed: int = 0
) -> NoisyLabels:
    """Open-set noise: whole classes are dissolved and merged, a few look-alike images at a time, into others.

    ``round(fraction * C)`` classes (half up), chosen at random among those present, leave the label set. Each
    one's images are clustered (k-means, ``k = ceil(n / 2)``) and every cluster goes to a
    remaining class drawn uniformly. Remaining classes are renumbered ``0..C'-1`` in the order of their ids.
    PRISM's features and exact k are unknown; the counts in its lists (50 of 98 classes for CARS 50 %) fit
    "dissolve until that share of the *images* is noise", a class more or less than a share of the classes.

    Args:
        label: ``(N,)`` clean class ids.
        embedding: ``(N, D)`` frozen features that tell which images look alike.
        fraction: share of the classes that are dissolved, in [0, 1]; at least one class must remain.
        seed: not negative.

    Returns:
        ``NoisyLabels``: ``label`` in ``0..C'-1``; ``clean_label`` the *original* class ids, not comparable
        with ``label`` (use ``true_label`` for that); ``is_noise`` true for images of dissolved classes;
        ``class_id`` the original ids of the remaining classes. If no class is dissolved, the labels are
        returned as they are and ``class_id`` is ``None``.

    Raises:
        ValueError: a label, the fraction or the seed is out of range, the embedding is missing, not finite
            or of the wrong shape, or no class would remain.
    """
    check_rate("fraction", fraction)
    check_seed("seed", seed)
    clean = _checked_label(label, None)
    rows = _checked_embedding(embedding, len(clean))
    classes = np.unique(clean)
    num_dissolved = math.floor(fraction * len(classes) + 0.5)
    if not num_dissolved:
        return NoisyLabels(clean.copy(), clean, np.zeros(len(clean), dtype=bool))
    if num_dissolved == len(classes):
        raise ValueError(
            f"fraction={fraction} of {len(classes)} classes leaves no class to merge into; lower the fraction"
        )
    choice, start, target = uniform(seed, 3, len(clean))  # there are at least as many samples as classes
    dissolved = classes[np.argsort(choice[: len(classes)], kind="stable")[:num_dissolved]]
    is_noise = np.isin(clean, dissolved)
    remaining = np.unique(clean[~is_noise])
    given = np.searchsorted(remaining, clean)
    wrong = np.minimum((target * len(remaining)).astype(np.int64), len(remaining) - 1)
    by_class = np.argsort(clean, kind="stable")
    bounds = np.append(np.searchsorted(clean[by_class], classes), len(clean))
    for i in np.flatnonzero(np.isin(classes, dissolved)):
        members = by_class[bounds[i] : bounds[i + 1]]
        given[members] = wrong[members][_clusters(rows[members], start[members])]
    return NoisyLabels(given, clean, is_noise, remaining)


def label_hash(label: ArrayLike | Tensor) -> str:
    """First 12 hex digits of the SHA-256 of the labels as little-endian int64: names a noisy label set."""
    array = label.detach().cpu().numpy() if isinstance(label, Tensor) else np.asarray(label)
    data = np.ascontiguousarray(array, dtype="<i8")
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()[:12]


def _from_table(
    clean: np.ndarray,
    config: NoiseConfig,
    num_classes: int,
    path: Sequence[str] | None,
    absent: Sequence[int],
) -> NoisyLabels:
    assert config.table is not None
    frame = read_label_table(config.table, config.column)
    rows = match_rows(frame, config.table, len(clean), path, absent)
    there = rows >= 0
    noisy = _labels_of_rows(frame, rows[there], clean[there], config, num_classes)
    return noisy if there.all() else noisy.spread(there)


def _labels_of_rows(
    frame: pd.DataFrame, rows: np.ndarray, clean: np.ndarray, config: NoiseConfig, num_classes: int
) -> NoisyLabels:
    assert config.table is not None
    frame = frame.iloc[rows]
    label = frame[config.column].to_numpy(dtype=np.int64)
    bad = (label < 0) | (label >= num_classes)
    if bad.any():
        where = int(np.argmax(bad))
        raise ValueError(
            f"label table '{config.table}', column '{config.column}', row {rows[where]}: {label[where]}; "
            f"class ids must lie in [0, {num_classes - 1}]"
        )
    if "clean_label" in frame.columns:
        other = (frame["clean_label"].to_numpy() != clean) & (frame["clean_label"].to_numpy() >= 0)
        if other.any():
            where = int(np.argmax(other))
            raise ValueError(
                f"label table '{config.table}', column 'clean_label', row {rows[where]}: "
                f"{frame['clean_label'].iloc[where]}, but the dataset says {clean[where]} for index {where}; "
                "the table was made for another order of the samples (else drop the column)"
            )
    known = "clean_label" in frame.columns and bool((frame["clean_label"] >= 0).all())
    known |= "is_noise" in frame.columns
    known |= "clean_known" in frame.columns and bool(frame["clean_known"].all())
    keep = frame["keep"].to_numpy(dtype=bool, copy=True) if "keep" in frame.columns else None
    if keep is not None and not keep.any():
        raise ValueError(f"label table '{config.table}', column 'keep' leaves no sample to train on")
    if "is_noise" not in frame.columns:
        return NoisyLabels(label, clean, label != clean, keep=keep, known=known)
    is_noise = frame["is_noise"].to_numpy(dtype=bool)
    class_id = renumbering(label, clean, is_noise, config.table)
    return NoisyLabels(label, clean, is_noise, class_id, keep, known)


def renumbering(label: np.ndarray, clean: np.ndarray, is_noise: np.ndarray, source: str) -> np.ndarray | None:
    """Original id of every given label, read off the clean rows; ``None`` if no label was renumbered."""
    right = ~is_noise
    if (label[right] == clean[right]).all():
        return None
    class_id = np.full(int(label.max()) + 1, -1, dtype=np.int64)
    class_id[label[right]] = clean[right]
    clash = (class_id[label[right]] != clean[right]).any() or len(np.unique(class_id)) != len(class_id)
    if clash or (class_id < 0).any():
        raise ValueError(
            f"label table '{source}', column 'is_noise' contradicts the labels: the rows that it calls right "
            "must pair each label with one class of the dataset; correct the column or drop it"
        )
    return class_id


def apply_noise(
    clean_label: ArrayLike | Tensor,
    config: NoiseConfig,
    num_classes: int,
    embedding: ArrayLike | Tensor | None = None,
    path: Sequence[str] | None = None,
    absent: Sequence[int] = (),
) -> NoisyLabels:
    """Give a training set the labels that ``config`` asks for.

    Args:
        clean_label: ``(N,)`` class ids in ``[0, num_classes)``; beside a table also -1 = none of the classes.
        config: the noise.
        num_classes: C.
        embedding: ``(N, D)`` frozen features, for ``small_cluster`` only.
        path: N paths, for tables that name samples by path.
        absent: samples of which a table need not know, as they are left out next.

    Returns:
        ``NoisyLabels``. Where ``class_id`` is set, the number of classes is now ``len(class_id)``.

    Raises:
        ValueError: bad labels or settings, or a table that does not fit the training set (rows missing,
            repeated or unknown, labels out of range, another set's clean labels).
        FileNotFoundError: the table does not exist.
    """
    if config.kind in MULTILABEL_KINDS:
        raise ValueError(
            f"noise.kind '{config.kind}' flips the labels of a multi-label set, but this set has one class "
            "per sample; use symmetric, asymmetric, pair_flip or small_cluster"
        )
    if config.table is not None:
        return _from_table(
            _checked_label(clean_label, num_classes, lowest=-1), config, num_classes, path, absent
        )
    clean = _checked_label(clean_label, num_classes)
    if config.kind == "symmetric":
        return symmetric(clean, config.rate, num_classes, config.seed)
    if config.kind == "asymmetric":
        mapping = by_number(config.mapping or {})  # names are the data set's to resolve
        return asymmetric(clean, config.rate, mapping, config.seed, num_classes)
    if config.kind == "pair_flip":
        return pair_flip(clean, config.rate, num_classes, config.seed)
    if config.kind == "small_cluster":
        return small_cluster(clean, embedding, config.rate, config.seed)
    return NoisyLabels(clean.copy(), clean, np.zeros(len(clean), dtype=bool))
