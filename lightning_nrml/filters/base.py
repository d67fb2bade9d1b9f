"""The contract of a noise filter."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_nrml.state import StateModule
from lightning_nrml.types import FilterContext, Selection


class NoiseFilter(StateModule):
    """Base class of all noise filters: decides which given labels to trust in a batch.

    A filter is pure maths: no Lightning, no ``torch.distributed``. It always sees the *gathered global
    batch*, so its decisions are the same on every rank and for every split of the batch over ranks.
    All state lives in persistent buffers of fixed shape that are written in place, so it is saved,
    restored and moved with the module, and its dtypes survive a cast of the model.

    Per step the driver calls ``select`` (before the loss) and ``update`` (after the backward pass).
    Before a filter's first active epoch only ``update`` is called, with everything kept, so that
    memories fill. Subclasses implement ``score`` and ``select``; the rest is optional.

    Attributes:
        granularities: ``"batch"`` and/or ``"epoch"``; the latter needs :meth:`select_scores` and a
            ``score`` that may be called on chunks of the training set.
        uses_embedding: False if scores do not depend on embeddings; a whole-set decision is then possible
            before the first epoch.
        requires: names of optional :class:`~lightning_nrml.types.FilterContext` fields that the filter
            cannot do without (``"logits"``, ``"per_sample_loss"``, ``"proxies"``, ``"teacher"``); the driver
            checks them, and modules compute costly ones only if a filter asks.
    """

    granularities: ClassVar[tuple[str, ...]] = ("batch",)
    uses_embedding: ClassVar[bool] = True
    requires: tuple[str, ...] = ()

    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)`` float32 log-probability that the given label is right; higher is cleaner."""
        raise NotImplementedError(f"{type(self).__name__} must implement score(ctx).")

    def select(self, ctx: FilterContext) -> Selection:
        """Decide on one global batch. May advance threshold statistics, but not the memory."""
        raise NotImplementedError(f"{type(self).__name__} must implement select(ctx).")

    def update(self, ctx: FilterContext, selection: Selection) -> None:
        """Take in the batch that was just trained on (only rows with ``selection.keep`` are trusted)."""

    def select_scores(self, score: Tensor) -> Selection:
        """Apply the filter's rule to the scores ``(N,)`` of the whole training set at once.

        NaN marks samples without an opinion (never seen, or no finite embedding yet); they are kept.
        Leaves the batch statistics alone.

        Raises:
            TypeError: if the filter has no such rule.
        """
        raise TypeError(f"{type(self).__name__} decides per batch only; use granularity='batch' with it.")

    def suggest(self, ctx: FilterContext) -> Tensor | None:
        """``(B,)`` most likely labels for the audit (-1 = none), or ``None`` if it cannot tell."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first batch of an epoch in which the filter is active."""

    def end_epoch(self, epoch: int) -> None:
        """Called after the last batch of an epoch in which the filter is active."""
