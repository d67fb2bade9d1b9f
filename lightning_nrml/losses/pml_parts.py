"""The side of the PML adapter that talks to pytorch-metric-learning: classes by name, weighted reducers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from torch import Tensor, nn

# Not usable as a loss of one labelled batch, and why.
UNUSABLE = {
    "BaseMetricLossFunction": "it is abstract",
    "GenericPairLoss": "it is abstract",
    "ManifoldLoss": "it takes no labels",
    "VICRegLoss": "it takes no labels and needs two views",
    "BaseMiner": "it is abstract",
    "EmbeddingsAlreadyPackagedAsTriplets": "it ignores the labels",
}
# Arguments that are objects in pytorch-metric-learning: in YAML a class name, or {name: ..., <arguments>}.
PARTS = {
    "distance": distances,
    "reducer": reducers,
    "weight_regularizer": regularizers,
    "embedding_regularizer": regularizers,
}


class WeightedReducer(nn.Module):
    """Multiplies the terms of a loss by sample weights, then hands them to the loss's own reducer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight: Tensor | None = None

    def forward(self, loss_dict: dict[str, dict[str, Any]], embeddings: Tensor, labels: Tensor) -> Tensor:
        (name,) = loss_dict
        info = loss_dict[name]
        terms = info["losses"]
        if not isinstance(terms, Tensor):  # PML's mark for "no pairs": the number 0
            return self._reduce(loss_dict, embeddings, labels)
        if terms.numel() == 0:  # the mean of nothing would be NaN
            return (embeddings * 0.0).sum()
        if self.weight is not None and not name.endswith("_reg_loss"):
            if isinstance(self.inner, reducers.ThresholdReducer):
                return self._past_threshold(terms, self._product(info))
            info = {**info, "losses": terms * self._share(info)}
        return self._reduce({name: info}, embeddings, labels)

    def _reduce(self, *args: Any) -> Tensor:
        reduced: Tensor = self.inner(*args)
        return reduced

    def _past_threshold(self, terms: Tensor, product: Tensor) -> Tensor:
        """Weighted mean of the terms that pass the thresholds as they are, without weights."""
        inner: Any = self.inner
        past = torch.ones_like(terms, dtype=torch.bool)
        for bound, passes in ((inner.low, torch.gt), (inner.high, torch.lt)):
            if bound is not None:
                past &= passes(terms, bound)
        share = product * past
        return (share * terms).sum() / share.sum().clamp_min(torch.finfo(terms.dtype).tiny)

    def _product(self, info: Mapping[str, Any]) -> Tensor:
        """The weights of all samples of a term, multiplied."""
        assert self.weight is not None
        terms, indices = info["losses"], info["indices"]
        if info["reduction_type"] == "already_reduced":
            raise ValueError(
                "This PML loss returns no terms per sample, so it takes only weights 0 and 1; "
                "use a filter that keeps or drops, or another loss."
            )
        columns = indices if isinstance(indices, (tuple, list)) else [indices]
        product = torch.stack([self.weight[rows] for rows in columns]).prod(dim=0)
        return product.view(-1, *[1] * (terms.ndim - 1))

    def _share(self, info: Mapping[str, Any]) -> Tensor:
        """The same with mean 1 over the terms that the reducer counts."""
        terms, product = info["losses"], self._product(info)
        partial = isinstance(self.inner, reducers.DivisorReducer)  # which divides by the terms above 0
        counted = (terms.detach() != 0) if partial else torch.ones_like(terms, dtype=torch.bool)
        mean = (product * counted).sum() / counted.sum().clamp(min=1)
        return product / torch.where(mean > 0, mean, torch.ones_like(mean))


def wrap_reducers(pml: nn.Module) -> list[WeightedReducer]:
    """Put a :class:`WeightedReducer` around each reducer of a PML loss; returns them."""
    outer: Any = pml.reducer
    if isinstance(outer, reducers.MultipleReducers):
        wrapped = {k: WeightedReducer(r) for k, r in outer.reducers.items()}
        default = WeightedReducer(outer.default_reducer)
        outer.reducers, outer.default_reducer = nn.ModuleDict(wrapped), default
        return [*wrapped.values(), default]
    single = WeightedReducer(outer)
    pml.reducer = single
    return [single]


class MissingSizeError(ValueError):
    """A number of classes or columns that the class needs, and that a module may still tell."""


def build(module: Any, kind: str, name: str, given: dict[str, Any], sizes: Mapping[str, Any]) -> nn.Module:
    """Make a PML object by class name, with errors that say what is accepted."""
    cls = _find(module, kind, name)
    accepted = _accepted(cls)
    for key in given:
        if key not in accepted:
            raise ValueError(
                f"{name} has no argument '{key}'{_nearest(key, accepted)}; "
                f"it takes {', '.join(sorted(accepted))}."
            )
    arguments = {k: v for k, v in sizes.items() if v is not None and k in accepted}
    arguments |= {k: _part(k, v) for k, v in given.items()}
    missing = [k for k, needed in accepted.items() if needed and k not in arguments]
    if missing:
        error = MissingSizeError if set(missing) <= set(sizes) else ValueError
        raise error(f"{name} needs the argument '{missing[0]}'.")
    built: nn.Module = cls(**arguments)
    return built


def _find(module: Any, kind: str, name: str) -> Callable[..., Any]:
    base = {losses: losses.BaseMetricLossFunction, miners: miners.BaseMiner}.get(module, nn.Module)
    names = [
        k for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, base) and k not in UNUSABLE
    ]
    if name in UNUSABLE:
        raise ValueError(f"{name} of pytorch-metric-learning cannot be used here: {UNUSABLE[name]}.")
    if name not in names:
        raise ValueError(
            f"pytorch-metric-learning has no {kind} '{name}' for a labelled batch{_nearest(name, names)}; "
            f"there are {', '.join(sorted(names))}."
        )
    found: Callable[..., Any] = getattr(module, name)
    return found


def _accepted(cls: Any) -> dict[str, bool]:
    """Arguments of a PML class, collected over its bases (they pass ``**kwargs`` up) -> is it required?"""
    found: dict[str, bool] = {}
    for base in cls.__mro__:
        if base.__module__.startswith("pytorch_metric_learning") and "__init__" in vars(base):
            for key, p in inspect.signature(base.__init__).parameters.items():
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                    found.setdefault(key, p.default is p.empty)
    for internal in ("self", "mat_based_loss"):  # subclasses of GenericPairLoss set the latter themselves
        found.pop(internal, None)
    return found


def _part(key: str, value: Any) -> Any:
    if key not in PARTS or not isinstance(value, (str, Mapping)):
        return value
    given = {"name": value} if isinstance(value, str) else dict(value)
    if "name" not in given:
        raise ValueError(f"'{key}' must be a class name, or a mapping with 'name' and its arguments.")
    return build(PARTS[key], key, given.pop("name"), given, {})


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
