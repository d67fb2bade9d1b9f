"""A weighted sum of losses on the same embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_nrml.losses.base import Loss


class CombinedLoss(Loss):
    """``sum_k weights[k] * losses[k](embedding, label, weight)``.

    A softmax loss beside a pair loss is the usual pair: the softmax resists wrong labels on classes of many
    images and gives filters a posterior, the pair loss shapes the neighbourhoods that retrieval uses.
    What filters ask for (logits, proxies) comes from the first loss that has it.

    Args:
        losses: the parts, at least one.
        weights: their weights, finite and not negative; default 1 each.

    Raises:
        ValueError: no losses, or weights that do not fit.
    """

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("CombinedLoss needs at least one loss in 'losses'.")
        strange = [type(part).__name__ for part in losses if not isinstance(part, Loss)]
        if strange:
            raise TypeError(
                f"CombinedLoss takes losses of lightning_nrml, got {strange[0]}; PMLLoss wraps those of "
                "pytorch-metric-learning."
            )
        weights = [1.0] * len(losses) if weights is None else [float(w) for w in weights]
        if len(weights) != len(losses) or not all(0 <= w < float("inf") for w in weights):
            raise ValueError(
                f"'weights' must hold {len(losses)} numbers of 0 or more, one per loss; got {list(weights)}."
            )
        self.losses = nn.ModuleList(losses)
        self.weights = weights
        self.takes_pairs = any(part.takes_pairs for part in losses)  # type: ignore[misc]

    def set_sizes(self, num_classes: int | None, embedding_dim: int) -> None:
        """See :meth:`Loss.set_sizes`; for each part."""
        for part in self.losses:
            assert isinstance(part, Loss)
            part.set_sizes(num_classes, embedding_dim)

    def forward(
        self,
        embedding: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        pair_weight: Tensor | None = None,
    ) -> Tensor:
        """See :class:`~lightning_nrml.losses.base.Loss`; pair weights reach the parts that take them."""
        total = embedding.new_zeros(())
        for factor, part in zip(self.weights, self.losses, strict=True):
            assert isinstance(part, Loss)
            pairs = {"pair_weight": pair_weight} if part.takes_pairs and pair_weight is not None else {}
            total = total + factor * part(embedding, label, weight, **pairs)
        return total

    def arguments(self) -> dict[str, Any]:
        """The parts and their weights."""
        return {"losses": list(self.losses), "weights": self.weights}

    def _first(self, call: str, *args: Any) -> Tensor | None:
        return next((x for part in self.losses if (x := getattr(part, call)(*args)) is not None), None)

    def logits(self, embedding: Tensor) -> Tensor | None:
        """Of the first part that has classes."""
        return self._first("logits", embedding)

    def proxies(self) -> Tensor | None:
        """Of the first part that has them."""
        return self._first("proxies")

    def per_sample(self, embedding: Tensor, label: Tensor) -> Tensor | None:
        """Weighted sum over the parts that have one."""
        found = [
            w * x
            for w, part in zip(self.weights, self.losses, strict=True)
            if (x := part.per_sample(embedding, label)) is not None  # type: ignore[operator]
        ]
        return None if not found else sum(found[1:], start=found[0])
