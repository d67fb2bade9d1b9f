"""Constructor arguments as plain values, so that a checkpoint can be read anywhere and rebuild its module."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.parsing import collect_init_args

from lightning_nrml.losses import Loss

T = TypeVar("T")

#: where weights came from; those of a checkpoint are in the checkpoint
LEFT_OUT = ("pretrained", "init_weights", "backbone_ckpt")


class _NotPlainError(Exception):
    pass


def plain_arguments(frame: FrameType) -> dict[str, Any]:
    """Arguments of the outermost constructor call that ``frame`` (an ``__init__``) runs in.

    Configs become mappings and losses ``{class_path, init_args}``, as in YAML. Other objects, such as
    modules that a subclass takes, are left out: ``load_from_checkpoint`` then needs them by name.
    """
    given = collect_init_args(frame, [], classes=(LightningModule,))[-1]
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in LEFT_OUT:
            try:
                found[name] = _plain(value)
            except _NotPlainError:
                continue
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Loss):
        return _plain_loss(value)
    raise _NotPlainError


def _plain_loss(loss: Loss) -> dict[str, Any]:
    try:
        arguments = _plain(loss.arguments())
    except _NotPlainError:
        arguments = None
    return {"class_path": f"{type(loss).__module__}.{type(loss).__qualname__}", "init_args": arguments}


def as_config(cls: type[T], value: T | Mapping[str, Any] | None) -> T:
    """``value``, or the config that a checkpoint holds as a mapping; ``None`` gives the defaults."""
    if value is None:
        return cls()
    return cls(**value) if isinstance(value, Mapping) else value


def as_loss(value: Loss | Mapping[str, Any]) -> Loss:
    """``value``, or the loss that a checkpoint describes.

    Raises:
        ValueError: the loss's class is not imported, or its arguments are not known.
    """
    if not isinstance(value, Mapping):
        return value
    path, arguments = value["class_path"], value["init_args"]
    home, _, name = path.rpartition(".")
    # only what is imported already: a checkpoint must not make us run code of its choice
    cls = getattr(sys.modules.get(home), name, None)
    if not (isinstance(cls, type) and issubclass(cls, Loss)) or arguments is None:
        raise ValueError(
            f"The loss {path} of the checkpoint cannot be rebuilt: pass it, as in "
            "load_from_checkpoint(path, loss=...)."
        )
    return cls(**{name: _with_losses(x) for name, x in arguments.items()})


def _with_losses(value: Any) -> Any:
    """A list of losses, as those that combine others take, is rebuilt one by one."""
    described = (
        isinstance(value, list) and value and all(isinstance(x, Mapping) and "class_path" in x for x in value)
    )
    return [as_loss(x) for x in value] if described else value
