"""What all losses share: the narrow base class, fp32, dropped rows and checks."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# A row that is no longer than this has no direction.
NO_LENGTH = 1e-12


class Loss(nn.Module):
    """Base class of the losses on one batch of embeddings.

    Rules that every subclass keeps: the maths is in fp32 (or wider) whatever the input and autocast; the
    value on a rank is the mean over its own anchors against gathered keys, so that DDP's mean of values
    and gradients equals one process on the whole batch (all ranks give equally many rows); a row of
    weight 0 takes no part and gets exactly zero gradient, even if it holds NaN; a batch in which nothing
    is kept gives 0, attached to the graph.

    Attributes:
        takes_pairs: whether ``forward`` also takes ``pair_weight (B, M)``, the weights of the pairs of this
            rank's rows with the ``M`` rows of the gathered batch.
    """

    takes_pairs: ClassVar[bool] = False

    def forward(self, embedding: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            embedding: ``(B, D)`` of any float type; normalised inside where the method needs unit rows.
            label: ``(B,)`` int64 given labels.
            weight: ``(B,)`` sample weights in [0, 1]; ``None`` = all 1.

        Returns:
            0-d tensor, float32 (float64 for float64 input).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(embedding, label, weight).")

    def set_sizes(self, num_classes: int | None, embedding_dim: int) -> None:
        """Told once, by the module that takes the loss: what it knows of the sizes (``None`` = not known).

        A loss with parameters takes those that it was not given, and makes its parameters. Calling it again
        changes nothing.

        Raises:
            ValueError: a size is needed and nobody knows it, or the one given to the loss does not fit.
        """

    def logits(self, embedding: Tensor) -> Tensor | None:
        """``(B, C)`` class logits for filters that need them; ``None`` if the loss has no classes."""
        return None

    def per_sample(self, embedding: Tensor, label: Tensor) -> Tensor | None:
        """``(B,)`` float32 unreduced loss without gradient, for filters; ``None`` if the loss has none.

        NaN for rows that are not finite. Every rank must call it at the same time.
        """
        return None

    def proxies(self) -> Tensor | None:
        """``(C, D)`` learned directions of the classes, for filters; ``None`` if the loss has none."""
        return None

    def arguments(self) -> dict[str, Any] | None:
        """Constructor arguments, by which a checkpoint can rebuild this loss; ``None`` = not known.

        Read from the attributes of the same names; a subclass that keeps them otherwise overrides this.
        """
        names = list(inspect.signature(type(self)).parameters)
        return {n: getattr(self, n) for n in names} if all(hasattr(self, n) for n in names) else None


def size_of(loss: str, name: str, own: int | None, told: int | None, fits: bool = True) -> int:
    """The size given to a loss, else the one that the module tells it.

    Raises:
        ValueError: neither is known, or (``fits=False``) they contradict each other; names both.
    """
    if own is None and told is None:
        raise ValueError(
            f"{loss} needs '{name}': give it to the loss, or to the module that takes the loss (on the "
            "command line it comes from the data)."
        )
    if own is not None and told is not None and not fits:
        raise ValueError(
            f"{loss} has {name} {own}, but the module that takes it {told}: leave it out of the loss."
        )
    return int(told if own is None else own)  # type: ignore[arg-type]


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which autocast does not touch operations on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)


def widen(x: Tensor) -> Tensor:
    """``x`` as float32, or as it is if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of ``x (B, D)`` scaled to length 1, in fp32 or wider. A zero row stays zero.

    It gets no gradient either: a row without direction has none, where ``F.normalize`` passes back 1e12
    times what arrives and one dead embedding throws the whole net away.
    """
    x = widen(x)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / length.masked_fill(length <= NO_LENGTH, torch.inf)


def prepare(embedding: Tensor, label: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check a batch, widen it and blank the dropped rows, so that nothing in them can reach the loss.

    Returns:
        ``(B, D)`` embedding whose dropped rows are 0 and pass no gradient back, and ``(B,)`` weight of the
        same type (1 everywhere without weights; NaN counts as 0).

    Raises:
        ValueError: if the shapes do not agree.
    """
    if embedding.ndim != 2:
        raise ValueError(f"'embedding' must be (B, D), got shape {tuple(embedding.shape)}.")
    for name, x in (("label", label), ("weight", weight)):
        if x is not None and x.shape != embedding.shape[:1]:
            raise ValueError(
                f"'{name}' must have shape ({len(embedding)},), one per row of 'embedding', "
                f"got {tuple(x.shape)}."
            )
    z = widen(embedding)
    if weight is None:
        return z, z.new_ones(len(z))
    w = weight.detach().to(z)
    kept = w > 0
    return z.masked_fill(~kept[:, None], 0.0), w.masked_fill(~kept, 0.0)


def safe_divide(total: Tensor, by: Tensor) -> Tensor:
    """``total / by``, and ``total`` (which is 0 then) where ``by`` is 0: no NaN, and the graph stays."""
    return total / torch.where(by > 0, by, torch.ones_like(by))
