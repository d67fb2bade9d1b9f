"""The filters of one module, and the one function that runs them.

``FilterChain`` gathers the batch over ranks, asks every active filter, multiplies their weights and
hands each rank its own rows back; after the backward pass ``commit`` lets the filters learn from the
batch. It is the bridge between rank-local training code and filters that know nothing of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.precision import float32_default
from lightning_nrml.types import FilterContext, Selection

Mode = Literal["off", "observe", "batch", "epoch"]

#: Attributes that callbacks add to a module; their state may be absent or left over.
ATTACHED = ("filters", "noise_ledger", "feature_bank", "filter_teacher", "probes", "knn_bank")
#: those that may begin with a run that is resumed; the teacher must come from its checkpoint, and the last
#: two say themselves what a checkpoint without them means
STARTS_ANEW = ("filters", "noise_ledger", "feature_bank")


_REMEDY = {
    "logits": "use a loss with a classifier or proxies, or pass logits= to select()",
    "per_sample_loss": "use a loss that has one, such as CosineSoftmaxLoss or ContrastiveLoss, "
    "or pass per_sample_loss= to select()",
    "proxies": "use a loss with proxies, such as CosineSoftmaxLoss, or pass proxies= to select()",
    "teacher": "attach the filter by its own callback, and pass batch= to select()",
}


def gathered_context(
    *,
    embedding: Tensor,
    label: Tensor,
    index: Tensor,
    logits: Tensor | None = None,
    per_sample_loss: Tensor | None = None,
    proxies: Tensor | None = None,
    teacher: Tensor | None = None,
    epoch: int = 0,
    step: int = 0,
) -> tuple[FilterContext, slice]:
    """The global batch as filters see it, and where this rank's rows lie in it.

    Args:
        embedding: ``(B, D)`` rows of this rank, any scale and dtype; ranks may hold unequal B.
        label, index, logits, per_sample_loss, epoch, step: see :class:`FilterContext`.
        proxies: ``(C, D)``, equal on all ranks: not gathered.
        teacher: ``(B, D')`` rows of this rank, any scale and dtype.
    """
    sizes = distributed.gather_sizes(label.shape[0], label.device)

    def collect(x: Tensor | None) -> Tensor | None:
        return None if x is None else distributed.gather(x, sizes=sizes)

    def unit(x: Tensor) -> Tensor:
        return F.normalize(distributed.gather(x.detach().float(), sizes=sizes), dim=1)

    ctx = FilterContext(
        embedding=unit(embedding),
        label=distributed.gather(_long(label), sizes=sizes),
        index=distributed.gather(_long(index), sizes=sizes),
        logits=collect(logits),
        per_sample_loss=collect(per_sample_loss),
        epoch=epoch,
        step=step,
        proxies=None if proxies is None else proxies.detach(),
        teacher=None if teacher is None else unit(teacher),
    )
    return ctx, distributed.own_rows(sizes)


def _long(x: Tensor) -> Tensor:
    """Integers as int64, which indices of torch and our tables are; others as they are."""
    return x if x.is_floating_point() or x.dtype is torch.bool else x.long()


class FilterChain(nn.ModuleDict):
    """Ordered filters of a module by name; their weights multiply.

    ``mode[name]`` is set by the callback that owns the filter: ``"observe"`` only fills memories,
    ``"batch"`` decides in every step, ``"epoch"`` applies the decision of the last whole-set pass,
    which ``epoch_keep[name]()`` returns as a ``(N,)`` bool tensor by dataset index.

    ``sources[field](batch)`` computes a field of the context from this rank's batch, where a callback
    brings the means for it (a teacher's embedding). ``last`` is the batch that was committed last, for logs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode: dict[str, Mode] = {}
        self.epoch_keep: dict[str, Callable[[], Tensor]] = {}
        self.sources: dict[str, Callable[[Any], Tensor]] = {}
        self.pending: tuple[FilterContext, Selection] | None = None
        self.last: tuple[FilterContext, Selection] | None = None

    def wants(self, field: str) -> bool:
        """Whether a filter that is switched on needs this optional field of the context."""
        return any(field in part.requires for _, part in self.named_filters())

    def from_sources(self, batch: Any) -> dict[str, Tensor]:
        """The fields that callbacks compute from this rank's batch, as far as a filter wants them."""
        return {field: source(batch) for field, source in self.sources.items() if self.wants(field)}

    def named_filters(self) -> Iterator[tuple[str, NoiseFilter]]:
        """The filters that are switched on in any mode, in order."""
        for name, part in self.items():
            if self.mode.get(name, "off") != "off":
                assert isinstance(part, NoiseFilter)
                yield name, part

    def select(self, ctx: FilterContext) -> Selection:
        """Decide on a gathered batch; remembers it for :meth:`commit`."""
        total = Selection.keep_all(ctx.label)
        for name, part in self.named_filters():
            mode = self.mode[name]
            if mode == "batch":
                total = _combine(total, self._ask(name, part, ctx), name)
            elif mode == "epoch":
                keep = self.epoch_keep[name]()[ctx.index].float()
                none = Selection.keep_all(keep)
                total = _combine(total, replace(none, weight=keep), name)
        self.pending = (ctx, total)
        return total

    @staticmethod
    def _ask(name: str, part: NoiseFilter, ctx: FilterContext) -> Selection:
        for field in part.requires:
            if getattr(ctx, field) is None:
                raise ValueError(
                    f"The filter '{name}' ({type(part).__name__}) needs `{field}`, but the module's step "
                    f"gives none: {_REMEDY[field]}."
                )
        with torch.no_grad(), float32_default():
            return part.select(ctx)

    @torch.no_grad()
    @float32_default()
    def commit(self) -> tuple[FilterContext, Selection] | None:
        """Let the filters learn from the batch of the last ``select``; returns that batch, once."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.last = pending
            for _, part in self.named_filters():
                part.update(*pending)
        return pending


def _combine(first: Selection, second: Selection, name: str) -> Selection:
    """Product of the weights; scores add (log-probabilities), a missing opinion counts as none.

    ``stats`` has those of every filter, and its threshold, under its name; the first threshold counts. What
    a filter says of a sample ``(B,)`` holds for each of its labels if the batch has ``(B, L)``.
    """
    weight, other = (
        x if x.ndim == first.weight.ndim else x.unsqueeze(1) for x in (second.weight, second.score)
    )
    score = torch.where(first.score.isnan(), other, first.score + torch.where(other.isnan(), 0.0, other))
    pair = second.pair_weight
    if first.pair_weight is not None:
        pair = first.pair_weight if pair is None else first.pair_weight * pair
    own = {**second.stats, "threshold": second.threshold}
    stats = {**first.stats, **{f"{name}/{k}": v for k, v in own.items()}}
    threshold = torch.where(first.threshold.isnan(), second.threshold, first.threshold)
    return Selection(first.weight * weight, score, threshold, stats, pair)


def select(
    module: nn.Module,
    *,
    embedding: Tensor,
    label: Tensor,
    index: Tensor,
    logits: Tensor | None = None,
    per_sample_loss: Tensor | None = None,
    proxies: Tensor | None = None,
    batch: Any = None,
    epoch: int | None = None,
    step: int | None = None,
) -> Selection:
    """Ask the noise filters attached to *any* LightningModule which rows of this batch to trust.

    Call it in ``training_step`` and weight the loss with ``selection.weight``; the filter callback
    (``PRISM(...)`` in ``Trainer(callbacks=...)``) does the rest. Without filters all weights are 1.

    Args:
        module: the module that the callback attached its filter to (``self``).
        embedding: ``(B, D)``, any scale; no gradient flows through the filter.
        label: ``(B,)`` given labels, or ``(B, L)`` 0/1; the weights have its shape.
        index: ``(B,)`` positions in the training set.
        logits: ``(B, C)``, for filters that need a posterior.
        per_sample_loss: ``(B,)``, for filters that look at the loss.
        proxies: ``(C, D)`` class weights or proxies, for filters that compare with them.
        batch: the whole batch, for callbacks that compute a filter's input from it (T-SINT's teacher).
        epoch, step: taken from ``module`` when it is a LightningModule.

    Returns:
        The decision on this rank's rows.
    """
    chain = getattr(module, "filters", None)
    if not isinstance(chain, FilterChain) or not module.training or not any(chain.named_filters()):
        return Selection.keep_all(label)
    counters: Any = module
    ctx, rows = gathered_context(
        embedding=embedding,
        label=label,
        index=index,
        logits=logits,
        per_sample_loss=per_sample_loss,
        proxies=proxies,
        teacher=None if batch is None else chain.from_sources(batch).get("teacher"),
        epoch=getattr(counters, "current_epoch", 0) if epoch is None else epoch,
        step=getattr(counters, "global_step", 0) if step is None else step,
    )
    return chain.select(ctx).rows(rows)


def tolerate_absent_filters(module: nn.Module) -> None:
    """Let ``module`` load a checkpoint that holds the state of callbacks that are not attached now.

    Removes exactly the entries below :data:`ATTACHED` (noise filters and their memories, online probes,
    the running kNN bank) that have no owner; any other unexpected key still raises. What the checkpoint has
    nothing of, because it was made without that callback, starts anew, with a warning.
    """
    if not getattr(module, "_nrml_tolerant", False):
        module.register_load_state_dict_pre_hook(_match_attached)
        module._nrml_tolerant = True  # type: ignore[assignment]


def _match_attached(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A function of the module, not a closure: a copy of the module must ask the copy."""
    own = {prefix + key: value for key, value in module.state_dict().items()}
    heads = tuple(f"{prefix}{name}." for name in ATTACHED)
    for key in [k for k in state if k.startswith(heads) and k not in own]:
        del state[key]
    anew = set()
    heads = tuple(f"{prefix}{name}." for name in STARTS_ANEW)
    for head in {_part_of(key, prefix) for key in own if key.startswith(heads)}:
        if not any(key.startswith(head) for key in state):
            state.update({key: value for key, value in own.items() if key.startswith(head)})
            anew.add(head.removeprefix(prefix).rstrip("."))
    if anew:
        warnings.warn(
            f"the checkpoint holds no state of {', '.join(sorted(anew))}: it was made without, so this "
            "starts anew",
            stacklevel=2,
        )


def _part_of(key: str, prefix: str) -> str:
    """``filters.prism.`` or ``noise_ledger.`` of a key."""
    name, *rest = key.removeprefix(prefix).split(".")
    return prefix + ".".join([name, rest[0], ""] if name == "filters" else [name, ""])
