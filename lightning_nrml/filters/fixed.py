"""A filter that knows the answer: the upper bound of every benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.indexing import check_index
from lightning_nrml.types import FilterContext, Selection


class FixedFilter(NoiseFilter):
    """Keeps exactly the samples of a given mask: a known-clean oracle, or a list made elsewhere.

    Args:
        mask: ``(N,)`` True (or 1) for the training-set positions to keep; ``None`` to hand it over later
            with :meth:`set_mask`.

    Attributes:
        clean: ``(N,)`` bool buffer, the mask by dataset index.
    """

    granularities: ClassVar[tuple[str, ...]] = ("batch", "epoch")
    uses_embedding: ClassVar[bool] = False
    clean: Tensor

    def __init__(self, mask: Tensor | Sequence[bool] | Sequence[int] | None = None) -> None:
        super().__init__()
        self.register_buffer("clean", torch.zeros(0, dtype=torch.bool))
        if mask is not None:
            self.set_mask(mask)

    def set_mask(self, mask: Tensor | Sequence[bool] | Sequence[int]) -> None:
        """Replace the mask.

        Args:
            mask: ``(N,)`` bools or 0/1, one entry per training sample.

        Raises:
            ValueError: if it is not one-dimensional, is empty, or holds anything but 0 and 1.
        """
        values = torch.as_tensor(mask)
        if values.ndim != 1 or values.numel() == 0:
            raise ValueError(
                f"mask must be one bool per training sample, shape (N,); got shape {tuple(values.shape)}."
            )
        if values.dtype is not torch.bool and not bool(((values == 0) | (values == 1)).all()):
            raise ValueError(
                "mask must hold only True/False (or 1/0), one entry per training sample; "
                "turn a list of positions into a mask first."
            )
        self.clean = values.detach().to(device=self.clean.device, dtype=torch.bool).clone()

    def score(self, ctx: FilterContext) -> Tensor:
        """``(B,)``: 0 for samples of the mask, ``-inf`` for the others.

        Raises:
            IndexError: if an index of the batch lies outside the mask (checked on the CPU only).
            RuntimeError: if no mask was given yet.
        """
        zero = torch.zeros(len(ctx), dtype=torch.float32, device=self.clean.device)
        return zero.masked_fill(~self._look_up(ctx.index), -torch.inf)

    def select(self, ctx: FilterContext) -> Selection:
        """Weight 1 for samples of the mask, 0 for the others; raises as :meth:`score`."""
        return self.select_scores(self.score(ctx))

    def select_scores(self, score: Tensor) -> Selection:
        """Drop the samples of score ``-inf``; any other score, NaN included, is kept."""
        keep = score != -torch.inf
        threshold = torch.full((), -torch.inf, device=score.device)
        return Selection(keep.float(), score, threshold)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """A filter without a mask takes the saved one, whatever its length."""
        saved = state.get(f"{prefix}clean")
        if saved is not None and not self.clean.numel():
            self.clean = self.clean.new_zeros(saved.shape)
        super()._load_from_state_dict(state, prefix, *args)

    def _look_up(self, index: Tensor) -> Tensor:
        size = self.clean.numel()
        if size == 0:
            raise RuntimeError("FixedFilter has no mask; pass mask=... or call set_mask(mask) first.")
        check_index(index, size, "The mask of FixedFilter")
        return self.clean[index.to(self.clean.device)]
