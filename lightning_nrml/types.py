"""The few data types that travel between data, modules, filters, losses and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

__all__ = ["Batch", "FilterContext", "LossFn", "PairLossFn", "Selection", "StepOutput"]


class Batch(TypedDict):
    """What a datamodule of this package yields.

    ``image`` is uint8 or float ``(B, channels, H, W)``; once the views have run it is the float view
    (or ``views`` holds the list of several). ``label`` is int64 ``(B,)``, or 0/1 ``(B, L)`` for
    multi-label data. ``index`` is int64 ``(B,)``, the position in the *training set* (or in the
    evaluated split). ``clean_label`` and, for multi-label data, the flip mask ``is_noise`` (bool
    ``(B, L)``) are for measurement only: no loss and no filter ever sees them.
    """

    image: Tensor
    label: Tensor
    index: Tensor
    views: NotRequired[list[Tensor]]
    clean_label: NotRequired[Tensor]
    is_noise: NotRequired[Tensor]


@dataclass(frozen=True, slots=True)
class FilterContext:
    """What a noise filter may look at: the gathered global batch, without gradients.

    Args:
        embedding: ``(B, D)`` detached float32 rows of unit length.
        label: ``(B,)`` int64 given labels (or ``(B, L)`` 0/1).
        index: ``(B,)`` int64 positions in the training set.
        logits: ``(B, C)`` detached classifier or proxy logits, if the module has them.
        per_sample_loss: ``(B,)`` detached unreduced loss, if the module has it.
        epoch: current epoch, from 0.
        step: optimiser steps done so far.
        proxies: ``(C, D)`` detached learned directions of the classes, if the loss has them.
        teacher: ``(B, D')`` detached float32 rows of unit length of a teacher on the same images.
    """

    embedding: Tensor
    label: Tensor
    index: Tensor
    logits: Tensor | None = None
    per_sample_loss: Tensor | None = None
    epoch: int = 0
    step: int = 0
    proxies: Tensor | None = None
    teacher: Tensor | None = None

    def __len__(self) -> int:
        return self.label.shape[0]


@dataclass(frozen=True, slots=True)
class Selection:
    """A filter's decision on a batch.

    Args:
        weight: ``(B,)`` in [0, 1] (or ``(B, L)``, one for each label), 0 or NaN = dropped from every loss and
            memory; below 1/2 from memories only.
        score: of the same shape, log-probability that the given label is right; NaN = no opinion.
        threshold: 0-d tensor, the score that had to be passed (NaN if none applied).
        stats: further scalars or per-class/per-sample tensors, for logs and audits.
        pair_weight: optional ``(B, B)`` weights in [0, 1] of the pairs of the (gathered) batch, for pairwise
            filters; a rank's part has its own rows and all columns.
    """

    weight: Tensor
    score: Tensor
    threshold: Tensor
    stats: Mapping[str, Any] = field(default_factory=dict)
    pair_weight: Tensor | None = None

    @property
    def keep(self) -> Tensor:
        """``(B,)`` (or ``(B, L)``) bool, True where the sample (or the label) is trusted: weight >= 1/2.

        Only these enter memories and count as kept; the loss takes the weights as they are.
        """
        return self.weight >= 0.5

    def rows(self, rows: slice) -> Selection:
        """The same decision for a contiguous part of the batch (this rank's rows)."""
        pair = None if self.pair_weight is None else self.pair_weight[rows]
        return replace(self, weight=self.weight[rows], score=self.score[rows], pair_weight=pair)

    @classmethod
    def keep_all(cls, label: Tensor) -> Selection:
        """The neutral decision: weight 1, no score. ``label`` gives the shape and device."""
        weight = torch.ones(label.shape, dtype=torch.float32, device=label.device)
        nan = torch.full_like(weight, torch.nan)
        return cls(weight, nan, weight.new_full((), torch.nan))


LossFn = Callable[[Tensor | None], Tensor | Mapping[str, Tensor]]
PairLossFn = Callable[[Tensor | None, Tensor], Tensor | Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What ``EmbeddingModule.step`` hands to the base class.

    Args:
        embedding: ``(B, D)``, with gradient; filters see its detached, normalised copy.
        label: ``(B,)`` given labels.
        index: ``(B,)`` dataset positions.
        logits: ``(B, C)`` if there is a classifier or proxies.
        loss_fn: called with the sample weights ``(B,)`` or ``None`` (no filter); returns the scalar
            loss, or a mapping with the key ``"loss"`` and further parts to log.
        per_sample_loss: ``(B,)`` unreduced loss; used when ``loss_fn`` is absent (weighted mean) and
            shown to filters.
        extras: anything else that callbacks may want to read.
        proxies: ``(C, D)`` learned directions of the classes, for filters.
        pair_loss_fn: called instead of ``loss_fn`` when a filter selects pairs, with the sample weights and
            this rank's pair weights ``(B, M)``; ``M`` rows are in the gathered batch.
    """

    embedding: Tensor
    label: Tensor
    index: Tensor
    logits: Tensor | None = None
    loss_fn: LossFn | None = None
    per_sample_loss: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    proxies: Tensor | None = None
    pair_loss_fn: PairLossFn | None = None
