"""A thin factory: timm's optimisers by name, torch's schedulers for warm-up and decay."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_nrml.optim.lars import LARS


@dataclass
class OptimizerConfig:
    """Optimiser settings.

    Args:
        name: any timm optimiser name (``adam``, ``adamw``, ``sgd``, ``lamb``, ...); ``lars`` is our own
            :class:`.LARS`, which adapts at weight decay 0 too.
        lr: peak learning rate, as it is: nothing is scaled behind your back.
        weight_decay: applied to weights; to biases, norm scales and what the backbone excepts (a ViT's class
            token and positions) only if ``decay_all``.
        momentum: for those that have one (SGD, LARS).
        loss_lr: learning rate of the loss's own parameters (class weights, proxies); default ``lr``.
        loss_weight_decay: weight decay of those parameters.
        decay_all: also decay biases and norm parameters, and let LARS adapt them (SwAV's LARC does both).
        kwargs: passed to the optimiser.

    Raises:
        ValueError: a rate or decay is negative, infinite or NaN.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    loss_lr: float | None = None
    loss_weight_decay: float = 0.0
    decay_all: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "loss_lr", "weight_decay", "loss_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"optimizer.{name} must be a number of at least 0, got {value}")


@dataclass
class ScheduleConfig:
    """Learning-rate schedule, advanced once per optimiser step.

    Args:
        name: ``cosine`` (to ``min_lr_ratio`` at the last step) or ``constant``, after the warm-up.
        warmup_steps: optimiser steps of linear warm-up; a number below 1 is a share of all steps.
        min_lr_ratio: final over peak learning rate, of each parameter group.
    """

    name: Literal["cosine", "constant"] = "cosine"
    warmup_steps: float = 0.05
    min_lr_ratio: float = 0.0


def create_optimizer(
    config: OptimizerConfig, model: nn.Module, loss_parameters: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """Optimiser over ``model``'s trainable parameters, the loss's own ones in a group of their own.

    Raises:
        ValueError: unknown optimiser name.
    """
    special = {id(p): p for p in loss_parameters if p.requires_grad}
    exempt = _without_decay(model)
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in special:
            spared = (p.ndim <= 1 or name in exempt) and not config.decay_all
            (plain if spared else decay).append(p)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {
            "params": list(special.values()),
            "lr": config.lr if config.loss_lr is None else config.loss_lr,
            "weight_decay": config.loss_weight_decay,
        },
    ]
    groups = [g for g in groups if g["params"]]
    known, name = list_optimizers(), config.name.lower()
    if name.removeprefix("lookahead_") not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ValueError(
            f"optimizer.name '{config.name}' is not an optimiser of timm; nearest: "
            f"{', '.join(near or ['adamw', 'sgd', 'lars'])}"
        )
    if name == "lars":
        for group in groups:
            group["adapt"] = group["params"] is decay
    try:
        if name == "lars":
            return LARS(groups, config.lr, config.momentum, weight_decay=config.weight_decay, **config.kwargs)
        optimizer: Optimizer = create_optimizer_v2(
            groups,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **config.kwargs,
        )
    except TypeError as error:
        raise ValueError(f"optimizer.kwargs {config.kwargs} do not fit '{config.name}': {error}") from error
    return optimizer


def _without_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that timm's nets except from weight decay (class token, positions)."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            found |= {f"{prefix}.{name}" if prefix else name for name in names()}
    return found


class _Schedule(LambdaLR):
    """Rates as a function of the step alone, so that a resumed run may have another length."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where the run is; how long it is, and so its rate, is this run's."""
        self.last_epoch = int(state_dict["last_epoch"])
        self._step_count = int(state_dict.get("_step_count", self.last_epoch + 1))
        groups = self.optimizer.param_groups
        self.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
        rates = zip(self.base_lrs, self.lr_lambdas, strict=True)
        self._last_lr = [peak * factor(self.last_epoch) for peak, factor in rates]
        for group, rate in zip(groups, self._last_lr, strict=True):
            group["lr"] = rate


def create_schedule(config: ScheduleConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Linear warm-up, then cosine (over the steps that are left, then its floor) or constant.

    A run that is resumed with another ``total_steps`` goes on where a run of that length would be.

    Args:
        config: the schedule.
        optimizer: its parameter groups may have different peak rates.
        total_steps: optimiser steps of the whole run.

    Raises:
        ValueError: negative warm-up, or one that is not shorter than the run.
    """
    if config.warmup_steps < 0:
        raise ValueError(f"schedule.warmup_steps is {config.warmup_steps}: give 0 or more.")
    share = config.warmup_steps < 1
    warmup = int(config.warmup_steps * total_steps) if share else int(config.warmup_steps)
    if warmup >= max(total_steps, 1) and warmup > 0:
        raise ValueError(
            f"schedule.warmup_steps is {warmup} but the run has only {total_steps} optimiser steps: "
            "lower it, or train longer."
        )
    after = max(total_steps - warmup, 1)
    floor = config.min_lr_ratio if config.name == "cosine" else 1.0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / after, 1.0)
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return _Schedule(optimizer, factor)
