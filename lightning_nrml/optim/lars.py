"""LARS in the variants of the self-supervised papers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

Trust = Literal["joint", "separate"]


class LARS(Optimizer):
    """SGD with momentum whose step is scaled, layer by layer, to the size of the weights.

    With ``u = g + weight_decay * w`` and trust ``t`` (1 where ``w`` or, for "joint", ``u``, for "separate",
    ``g`` is all 0):

    * ``trust="joint"``: ``t = eta |w| / |u|`` (official SimCLR ``lars_optimizer.py`` and BYOL
      ``utils/optimizers.py``);
    * ``trust="separate"``: ``t = eta |w| / (|g| + weight_decay |w|)`` (LARC of SwAV; You et al. 2017,
      arXiv 1708.03888, eq. 6).

    Then ``buffer = momentum * buffer + t u`` and ``w -= lr * buffer``, or with ``lr_in_momentum``, as in
    SimCLR, ``buffer = momentum * buffer + lr t u`` and ``w -= buffer`` (equal only while ``lr`` is constant).

    Unlike timm's, it also adapts at weight decay 0; which parameters are not adapted is said by the group
    key ``adapt`` alone. :func:`.create_optimizer` sets it to False for biases, norm parameters and the loss's
    own ones.

    Args:
        params: parameters or groups; a group may hold ``adapt: bool``.
        lr: learning rate, as it is.
        momentum: in [0, 1).
        weight_decay: coupled (L2), 0 or more.
        trust_coefficient: eta.
        trust: see above.
        lr_in_momentum: see above.
        clip: LARC's clipping, ``t = min(t / lr, 1)``: never a longer step than plain SGD's.
        adapt: default of the group key.

    Raises:
        ValueError: a number out of range, or an unknown ``trust``.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        trust: Trust = "joint",
        lr_in_momentum: bool = False,
        clip: bool = False,
        adapt: bool = True,
    ) -> None:
        if trust not in ("joint", "separate"):
            raise ValueError(f"trust must be 'joint' or 'separate', got '{trust}'.")
        if lr < 0 or weight_decay < 0 or trust_coefficient <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                "LARS needs lr >= 0, weight_decay >= 0, trust_coefficient > 0 and momentum in [0, 1), got "
                f"{lr}, {weight_decay}, {trust_coefficient} and {momentum}."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust": trust,
            "lr_in_momentum": lr_in_momentum,
            "clip": clip,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; parameters without a gradient are left alone, weight decay included."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        decay, lr = group["weight_decay"], group["lr"]
        updates = (
            list(torch._foreach_add(grads, params, alpha=decay)) if decay else [g.clone() for g in grads]
        )
        if group["adapt"]:
            torch._foreach_mul_(updates, _trust(group, params, grads, updates))
        if group["lr_in_momentum"]:
            torch._foreach_mul_(updates, lr)
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-1.0 if group["lr_in_momentum"] else -lr)


def _trust(
    group: dict[str, Any], params: list[Tensor], grads: list[Tensor], updates: list[Tensor]
) -> list[Tensor]:
    """0-d trust ratios; no value is read back, so a GPU never waits."""
    weight = torch.stack(list(torch._foreach_norm(params)))
    if group["trust"] == "joint":
        size = moving = torch.stack(list(torch._foreach_norm(updates)))
    else:
        moving = torch.stack(list(torch._foreach_norm(grads)))
        size = moving + group["weight_decay"] * weight
    ratio = group["trust_coefficient"] * weight / size
    ratio = torch.where((weight > 0) & (moving > 0), ratio, torch.ones_like(ratio))
    if group["clip"]:
        ratio = (ratio / group["lr"]).clamp(max=1.0)
    return list(ratio.unbind())
