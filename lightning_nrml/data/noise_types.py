"""What all label noise shares: the settings, the result and the random numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

NoiseKind = Literal[
    "none",
    "symmetric",
    "asymmetric",
    "pair_flip",
    "small_cluster",
    "subtractive",
    "additive",
    "mixed",
    "uniform",
    "images",
    "scores",
]
#: kinds for ``(N, L)`` labels, see :mod:`lightning_nrml.data.multilabel_noise`
MULTILABEL_KINDS = ("subtractive", "additive", "mixed", "uniform", "images", "scores")

#: settings of :class:`NoiseConfig` and the kinds that they belong to
_KINDS_OF = {
    "additive_rate": ("mixed", "scores"),
    "class_rates": ("subtractive", "additive", "mixed"),
    "class_additive_rates": ("mixed",),
    "scores": ("scores",),
}


@dataclass(frozen=True)
class NoisyLabels:
    """Labels of a training set after noise, each array of shape ``(N,)``, or ``(N, L)`` for multi-label sets.

    Args:
        label: int64, the given (noisy) labels, all that a method may see.
        clean_label: int64, the labels before noise, in *their* numbering; -1 = none of the classes.
        is_noise: bool, whether the given label is wrong.
        class_id: ``(C',)`` int64, original class id of every given label, where the noise renumbered the
            classes (``small_cluster``); else ``None``.
        keep: bool, False = a label table leaves the sample out of training; ``None`` = all are kept.
        known: whether ``clean_label`` is the truth; False = labels that a table replaced, and nothing says
            that they were right.
    """

    label: np.ndarray
    clean_label: np.ndarray
    is_noise: np.ndarray
    class_id: np.ndarray | None = None
    keep: np.ndarray | None = None
    known: bool = True

    @property
    def true_label(self) -> np.ndarray:
        """``clean_label`` in the numbering of ``label``; -1 where the true class is not in the label set.

        ``label == true_label`` exactly where ``is_noise`` is false, for every kind of noise.
        """
        if self.class_id is None:
            return self.clean_label
        # one more than there are classes, so that a clean label of -1 stays -1
        lookup = np.full(int(max(self.clean_label.max(), self.class_id.max())) + 2, -1, dtype=np.int64)
        lookup[self.class_id] = np.arange(len(self.class_id))
        return lookup[self.clean_label]

    def spread(self, there: np.ndarray) -> NoisyLabels:
        """The same for more samples, of which the ``there`` (bool) are these; the others are left out."""

        def wide(values: np.ndarray, fill: int) -> np.ndarray:
            out = np.full(len(there), fill, dtype=values.dtype)
            out[there] = values
            return out

        keep = np.ones(len(self.label), dtype=bool) if self.keep is None else self.keep
        return replace(
            self,
            label=wide(self.label, 0),
            clean_label=wide(self.clean_label, -1),
            is_noise=wide(self.is_noise, 1),
            keep=wide(keep, 0),
        )

    def to_columns(self) -> dict[str, np.ndarray]:
        """Columns for ``data.tables.write_label_table``; ``NoiseConfig.table`` reads the file back."""
        columns = {"index": np.arange(len(self.label)), "label": self.label}
        truth = {"clean_label": self.clean_label, "is_noise": self.is_noise}
        return columns | truth if self.known else columns


@dataclass
class NoiseConfig:
    """Which noise the training labels get.

    Args:
        kind: ``none`` (the default, but it must be said beside a rate), ``symmetric``, ``asymmetric``,
            ``pair_flip`` or ``small_cluster``; for multi-label sets ``subtractive``, ``additive``, ``mixed``,
            ``uniform``, ``images`` or ``scores``.
        rate: in [0, 1]: probability of a wrong label; for ``small_cluster`` the share of the classes that
            are dissolved; for ``subtractive``, ``additive`` and ``mixed`` flips over positives of each class;
            for ``images`` the share of images and of their labels; for ``scores`` the share of the positives
            that get lost. Not used by ``none`` and ``table``.
        seed: not negative; the same seed gives the same labels everywhere.
        mapping: for ``asymmetric``: wrong class by right class, by number or, where the data set knows them,
            by name; what reads as a whole number is a number.
        table: CSV or Parquet label table whose labels replace the dataset's; needs ``kind: none``. Samples
            whose ``keep`` is false are left out of training. The replaced labels count as the truth only if
            the table says so (``clean_label``, or ``clean_known``: true).
        column: the table's column that holds the labels; not used by multi-label sets, whose tables have a
            column for every label.
        additive_rate: for ``mixed`` and ``scores``: rate of the added labels, if not ``rate``, which the
            removed ones have.
        class_rates: for ``subtractive``, ``additive`` and ``mixed``: label name -> rate of that label, if not
            ``rate``.
        class_additive_rates: for ``mixed``: label name -> rate of its added labels.
        scores: for ``scores``: how much each train image looks like each label, as ``.npy`` ``(N, L)`` in the
            order of the train images, or a CSV or Parquet table like that of the labels.
    """

    kind: NoiseKind | None = None
    rate: float = 0.0
    seed: int = 0
    mapping: dict[int | str, int | str] | None = None
    table: str | None = None
    column: str = "label"
    additive_rate: float | None = None
    class_rates: dict[str, float] | None = None
    class_additive_rates: dict[str, float] | None = None
    scores: str | None = None

    def __post_init__(self) -> None:
        kinds = get_args(NoiseKind)
        check_rate("noise.rate", self.rate)
        if self.kind is None and self.rate and self.table is None:
            raise ValueError(
                f"noise.rate is {self.rate} but there is no noise.kind: set kind, such as symmetric (or none)"
            )
        self.kind = self.kind or "none"
        if self.kind not in kinds:
            near = difflib.get_close_matches(str(self.kind), kinds, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"noise.kind must be one of {', '.join(kinds)}, got '{self.kind}'{hint}")
        check_seed("noise.seed", self.seed)
        if self.table is not None and self.kind != "none":
            raise ValueError(
                f"noise.table replaces the labels, so noise.kind must be 'none' with it, got '{self.kind}'"
            )
        if self.kind == "asymmetric" and not self.mapping:
            raise ValueError("noise.kind 'asymmetric' needs noise.mapping, such as {7: 1, 2: 7}")
        self._check_multilabel()

    def _check_multilabel(self) -> None:
        for name, kinds in _KINDS_OF.items():
            value = getattr(self, name)
            if value is not None and self.kind not in kinds:
                need = "' or '".join(kinds)
                raise ValueError(f"noise.{name} needs noise.kind '{need}', got '{self.kind}'")
            for label, rate in value.items() if isinstance(value, dict) else ():
                check_rate(f"noise.{name}, '{label}'", rate)
        if self.additive_rate is not None:
            check_rate("noise.additive_rate", self.additive_rate)
        if self.kind == "scores" and self.scores is None:
            raise ValueError("noise.kind 'scores' needs noise.scores, a file of scores per image and label")


def by_number(
    mapping: Mapping[int | str, int | str], class_names: Sequence[str] | None = None
) -> dict[int, int]:
    """``noise.mapping`` with the numbers of its classes.

    Raises:
        ValueError: a name that is none of the classes', or a class named twice.
    """
    known = {name: c for c, name in enumerate(class_names or ())}

    def number(given: int | str) -> int:
        if isinstance(given, int) or re.fullmatch(r"[+-]?\d+", given.strip()):
            return int(given)
        if given in known:
            return known[given]
        if not known:
            raise ValueError(
                f"noise.mapping names a class '{given}', but this data set has no names of classes: give "
                "numbers"
            )
        near = difflib.get_close_matches(given, list(known), 1)
        hint = f"did you mean '{near[0]}'?" if near else f"they are {', '.join(list(known)[:10])}"
        raise ValueError(f"noise.mapping names '{given}', which is none of the {len(known)} classes; {hint}")

    pairs = [(number(source), number(target)) for source, target in mapping.items()]
    if len(dict(pairs)) < len(pairs):
        raise ValueError("noise.mapping names a class twice, by name and by number; keep one")
    return dict(pairs)


def check_rate(name: str, rate: float) -> None:
    """Raise ``ValueError`` unless ``rate`` lies in [0, 1]."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {rate}")


def check_seed(name: str, seed: int) -> None:
    """Raise ``ValueError`` if ``seed`` is negative."""
    if seed < 0:
        raise ValueError(f"{name} must not be negative, got {seed}")


def uniform(seed: int, rows: int, num_samples: int) -> np.ndarray:
    """``(rows, num_samples)`` float64 in [0, 1), 53 random bits each."""
    check_seed("seed", seed)
    bits = np.random.PCG64(seed).random_raw(rows * num_samples).reshape(rows, num_samples)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
