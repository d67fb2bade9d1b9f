"""Any loss of pytorch-metric-learning, with sample weights and right under DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_nrml import distributed
from lightning_nrml.losses.base import NO_LENGTH, Loss, full_precision, prepare, size_of, widen

# These list one term per proxy or per class, so a term has no sample whose weight could multiply it.
NO_SAMPLE_TERMS = ("ProxyAnchorLoss", "SmoothAPLoss")


class PMLLoss(Loss):
    """Adapter for the losses of pytorch-metric-learning (PML).

    Every rank computes the loss of the gathered batch, so its value is that of one process (PML's own
    wrapper returns it times the number of ranks) and DDP's mean of the gradients is exact; random miners
    draw the same on all ranks. Rows of weight 0 are removed before the miner and the loss. Fractional
    weights multiply each term (anchor, pair or triplet) that the loss lists by the product of the weights
    of its samples, normalised by the mean of these products: a weighted mean. Inside a term (the negatives
    of a softmax, say) all kept samples count alike. A row of zeros gets no gradient if PML normalises rows.

    Losses with parameters (proxies, class weights) train like any module; their maths is in fp32.

    Args:
        name: class in ``pytorch_metric_learning.losses``, for example ``"MultiSimilarityLoss"``.
        miner: class in ``pytorch_metric_learning.miners``, or ``None`` for all pairs or triplets.
        miner_kwargs: arguments of the miner.
        kwargs: arguments of the loss, as a dictionary for YAML. ``distance``, ``reducer`` and the
            regularisers may be given as a class name or as ``{"name": ..., <arguments>}``.
        num_classes: given to the loss if it takes it; ``None``: that of the module that takes this loss.
        embedding_size: given to the loss if it takes it; ``None``: the module's.
        **more: further arguments of the loss, as in ``PMLLoss("ContrastiveLoss", neg_margin=0.5)``.

    Raises:
        ValueError: for an unknown loss, miner or argument (with the nearest name), or a missing argument;
            for a missing size only if the module that takes the loss does not know it either.
    """

    def __init__(
        self,
        name: str,
        miner: str | None = None,
        miner_kwargs: Mapping[str, Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        embedding_size: int | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        self.name = name
        self._arguments: dict[str, Any] = {
            "name": name,
            "miner": miner,
            "miner_kwargs": miner_kwargs,
            "kwargs": {**(kwargs or {}), **more},
            "num_classes": num_classes,
            "embedding_size": embedding_size,
        }
        self.pml: nn.Module | None = None
        self.miner: nn.Module | None = None
        # Importing pytorch-metric-learning takes a second (SciPy): only for those who use it.
        from lightning_nrml.losses import pml_parts

        with contextlib.suppress(pml_parts.MissingSizeError):  # the module that takes this loss may tell
            self._build()

    def _build(self) -> None:
        from pytorch_metric_learning import losses, miners

        from lightning_nrml.losses import pml_parts

        given = self._arguments
        sizes = {
            "num_classes": given["num_classes"],
            "embedding_size": given["embedding_size"],
            "descriptors_dim": given["embedding_size"],  # what P2SGradLoss calls it
        }
        if given["miner"] is not None:
            self.miner = pml_parts.build(
                miners, "miner", given["miner"], dict(given["miner_kwargs"] or {}), {}
            )
        self.pml = pml_parts.build(losses, "loss", self.name, given["kwargs"], sizes)
        self._reducers = pml_parts.wrap_reducers(self.pml)

    def set_sizes(self, num_classes: int | None, embedding_dim: int) -> None:
        """See :meth:`Loss.set_sizes`."""
        for name, told in (("num_classes", num_classes), ("embedding_size", embedding_dim)):
            own = self._arguments[name]
            if own is not None and told is not None:
                size_of(self.name, name, own, told, own == told or (name == "num_classes" and own > told))
            elif self.pml is None:
                self._arguments[name] = told
        self._loss  # noqa: B018 - makes it

    @property
    def _loss(self) -> nn.Module:
        """The loss of PML; raises what it lacks if it could not be made yet."""
        if self.pml is None:
            self._build()
        assert self.pml is not None
        return self.pml

    def forward(self, embedding: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """See :class:`~lightning_nrml.losses.base.Loss`.

        Raises:
            ValueError: for fractional weights with a loss whose terms do not belong to samples.
        """
        with full_precision(embedding):
            z, w = prepare(embedding, label, weight)
            z = distributed.gather(z, grad=True)
            label = distributed.gather(label)
            # Keeps parameters in the graph where the loss does not touch them (DDP counts on it).
            nothing = sum(((p * 0.0).sum() for p in self._loss.parameters()), (z * 0.0).sum())
            fraction: Tensor | None = None
            if weight is not None:
                w = distributed.gather(w)
                rows = w.nonzero().squeeze(1)
                z, label, w = z[rows], label[rows], w[rows]
                fraction = w if bool((w != w[:1]).any()) else None
            if len(z) == 0:
                return nothing
            if fraction is not None and self.name in NO_SAMPLE_TERMS:
                raise ValueError(
                    f"{self.name} has one term per proxy or class, so it takes only weights 0 and 1; "
                    "use a filter that keeps or drops, or another loss."
                )
            with _same_draws(z.device), self._weighted(fraction):
                z = self._without_dead_rows(z)
                tuples = None if self.miner is None else self.miner(z, label)
                loss = self._call("forward", z, label, tuples)
            return loss.squeeze() + nothing

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments."""
        return dict(self._arguments)

    def logits(self, embedding: Tensor) -> Tensor | None:
        """``(B, C)`` logits in fp32 as PML defines them for this loss; ``None`` if it has none."""
        return self.get_logits(embedding) if hasattr(self._loss, "get_logits") else None

    def get_logits(self, embedding: Tensor) -> Tensor:
        """:meth:`logits`, under PML's name.

        Raises:
            TypeError: if the loss has no logits.
        """
        if not hasattr(self._loss, "get_logits"):
            raise TypeError(
                f"{self.name} has no class logits; use a proxy or softmax loss, e.g. ArcFaceLoss."
            )
        with full_precision(embedding):
            return self._call("get_logits", widen(embedding))

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return repr(self.name)

    def _without_dead_rows(self, z: Tensor) -> Tensor:
        """A row of zeros passes no gradient back where PML normalises, see :func:`.unit_rows`."""
        distance: Any = self._loss.distance
        if not getattr(distance, "normalize_embeddings", True):
            return z
        return z.masked_fill(torch.linalg.vector_norm(z, dim=1, keepdim=True) <= NO_LENGTH, 0.0)

    def _call(self, method: str, z: Tensor, *args: Any) -> Tensor:
        """Call the PML loss. PML casts parameters to the type of the embedding, for good: never let it."""
        parameters = dict(self._loss.named_parameters())
        if all(p.dtype == z.dtype for p in parameters.values()):
            result: Tensor = getattr(self._loss, method)(z, *args)
            return result
        for p in parameters.values():
            z = z.to(torch.promote_types(z.dtype, p.dtype))
        cast = {f"pml.{k}": p.to(z.dtype) for k, p in parameters.items()}
        return functional_call(_Method(self._loss, method), cast, (z, *args))  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _weighted(self, weight: Tensor | None) -> Iterator[None]:
        for reducer in self._reducers:
            reducer.weight = weight
        try:
            yield
        finally:
            for reducer in self._reducers:
                reducer.weight = None


class _Method(nn.Module):
    """Makes a method of a module the thing that ``functional_call`` calls."""

    def __init__(self, pml: nn.Module, method: str) -> None:
        super().__init__()
        self.pml = pml
        self.method = method

    def forward(self, *args: Any) -> Tensor:
        result: Tensor = getattr(self.pml, self.method)(*args)
        return result


@contextlib.contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Let all ranks draw the same random numbers, and leave the global generators alone."""
    if distributed.world_size() == 1:
        yield
        return
    from pytorch_metric_learning.utils import common_functions

    seed = int(distributed.gather(torch.randint(2**31, (1,), device=device))[0])
    devices = [device] if device.type == "cuda" else []
    numpy_random = common_functions.NUMPY_RANDOM
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        common_functions.NUMPY_RANDOM = np.random.default_rng(seed)  # PML's hook for this
        try:
            yield
        finally:
            common_functions.NUMPY_RANDOM = numpy_random
