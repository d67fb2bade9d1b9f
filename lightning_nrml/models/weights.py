"""Weights that a net starts from, and the backbone as a plain file for other libraries."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

from lightning_nrml.files import whole_file

PREFIX = "backbone."
# Batch norm does not need the number of batches it has seen, and some files leave it out.
OPTIONAL = "num_batches_tracked"


def load_weights(
    module: nn.Module, path: str | Path, argument: str = "init_weights", made_anew: Collection[str] = ()
) -> set[str]:
    """Start ``module`` from saved weights of a backbone, of an embedding net, or of a checkpoint.

    Reads ``.npz`` (arrays by parameter name), Lightning checkpoints (``state_dict`` inside) and plain
    torch files; of these only tensors and plain values, so that no file can run code. A name is taken as
    it is, or with ``backbone.`` put before it. Names of other parts (projectors, teachers, filters,
    memories) are left out only for Lightning checkpoints.

    The backbone is loaded whole: a file for another depth, which shares some names with the model, is
    refused and nothing is changed.

    Args:
        module: with a part ``backbone``.
        path: the file.
        argument: what the user calls ``path``, for messages.
        made_anew: parts of ``module`` that a Lightning checkpoint's state is not for: memories, teachers and
            what callbacks have attached, which belong to the run that it is of.

    Returns:
        Names of ``module``'s state that the file gave.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name or shape does not fit, or the file lacks a part of the backbone; lists the
            first ones. Or the file is damaged, or holds more than tensors.
    """
    state, lenient = _read_state(Path(path), argument)
    target = module.state_dict()
    found: dict[str, Tensor] = {}
    wrong: list[str] = []
    if lenient:
        state = {name: value for name, value in state.items() if name.partition(".")[0] not in made_anew}
    for name, value in state.items():
        full = next((n for n in (name, PREFIX + name) if n in target), None)
        if full is not None:
            _match(name, value, target[full], full, found, wrong)
        elif not lenient or name.startswith(PREFIX):
            wrong.append(f"{name} (not in the model)")
    absent = _absent([name for name in target if name.startswith(PREFIX)], found)
    if wrong or absent or not found:
        raise ValueError(
            f"{argument} '{path}' does not fit the model: {_shown(wrong, absent, state)}. {_mend(wrong)}"
        )
    module.load_state_dict(found, strict=False)
    return set(found)


def load_backbone(backbone: nn.Module, path: str | Path, argument: str = "backbone_ckpt") -> None:
    """Start a backbone from any file that :func:`load_weights` reads.

    Of a checkpoint of this package only the names ``backbone.*`` count; any other file must hold the
    names of the backbone itself, as :func:`export_backbone` and timm write them (timm's classifier is
    left out).

    Args:
        backbone: as :func:`.create_backbone` makes it.
        path: the file.
        argument: what the user calls ``path``, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file's backbone is not exactly this one; lists the first names.
    """
    state = backbone_state(path, argument)
    classifier = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = tuple(f"{n}." for n in ((classifier,) if isinstance(classifier, str) else classifier))
    target = backbone.state_dict()
    found: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, value in state.items():
        if name in target:
            _match(name, value, target[name], name, found, wrong)
        elif not (heads and name.startswith(heads)):
            wrong.append(f"{name} (not in the model)")
    absent = _absent(list(target), found)
    if wrong or absent:
        raise ValueError(
            f"{argument} '{path}' does not fit the backbone: {_shown(wrong, absent, state)}. Use the "
            "backbone, backbone_kwargs, in_channels and stem that the file was made with."
        )
    backbone.load_state_dict(found, strict=False)


def export_backbone(checkpoint: str | Path, target: str | Path) -> dict[str, Tensor]:
    """Write the backbone of a checkpoint as a plain state dict with timm's names.

    ``timm.create_model(name, num_classes=0, ...).load_state_dict(torch.load(target))`` reads it without
    this package (after a 3 x 3 stem has been put in, if the run had ``stem: cifar``).

    Args:
        checkpoint: a checkpoint of any module of this package, or another file that :func:`load_backbone`
            reads.
        target: file to write, such as ``backbone.pt``.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it holds no tensors.
    """
    state = {k: v.detach().cpu().clone() for k, v in backbone_state(checkpoint, "checkpoint").items()}
    if not state:
        raise ValueError(f"checkpoint '{checkpoint}' holds no tensors: nothing to export.")
    with whole_file(Path(target)) as part:
        torch.save(state, part)
    return state


def backbone_state(path: str | Path, argument: str) -> dict[str, Tensor]:
    """The backbone's tensors in a file, by their names within the backbone."""
    state, lenient = _read_state(Path(path), argument)
    inner = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    if lenient and not inner:
        names = ", ".join(list(state)[:5]) or "none"
        raise ValueError(
            f"{argument} '{path}' is a checkpoint without a part named 'backbone' (first names: {names}): "
            "save the backbone's own state_dict() from the code that wrote it, and give that file."
        )
    return inner or state


def _match(
    name: str, value: Tensor, target: Tensor, full: str, found: dict[str, Tensor], wrong: list[str]
) -> None:
    found[full] = value
    if target.shape != value.shape:
        wrong.append(f"{name} ({tuple(value.shape)} in the file, {tuple(target.shape)} in the model)")


def _absent(names: list[str], found: Mapping[str, Tensor]) -> list[str]:
    return [f"{n} (not in the file)" for n in names if n not in found and not n.endswith(OPTIONAL)]


def _shown(wrong: list[str], absent: list[str], state: Mapping[str, Tensor]) -> str:
    if not wrong and not absent:
        return f"no name in common (the file's first: {', '.join(list(state)[:3]) or 'none'})"
    shown = wrong[:3] + absent[:2]
    more = len(wrong) + len(absent) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _mend(wrong: list[str]) -> str:
    """Which arguments to look at: those of the backbone, or of the other parts that do not fit."""
    others = sorted({name.partition(".")[0] for name in wrong} - {PREFIX[:-1]})
    if others and not any(name.startswith(PREFIX) for name in wrong) and "head" not in others:
        return f"Give {' and '.join(others)} the sizes that the file was made with."
    return (
        "Use the backbone, backbone_kwargs, in_channels, stem and embedding_dim that the file was made with."
    )


def _read_state(path: Path, argument: str) -> tuple[dict[str, Tensor], bool]:
    """Tensors by name, and whether they are those of a Lightning checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file '{path}'.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as data:
                return {k: torch.from_numpy(np.array(data[k])) for k in data.files}, False
        whole = is_zipfile(path)  # older torch files are not, and cannot be mapped
        with torch.serialization.safe_globals([Namespace]):  # timm keeps its arguments beside the weights
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except (ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError, BadZipFile) as error:
        # torch refuses what it could only read by running code that the file brings
        if isinstance(error, pickle.UnpicklingError) and (whole or "GLOBAL" in str(error)):
            raise ValueError(
                f"{argument} '{path}' holds more than tensors, which is not read because it could run code: "
                "save the state_dict() of the net from the code that wrote it, and give that file."
            ) from error
        kind = "npz" if path.suffix == ".npz" else "torch file"
        raise ValueError(
            f"{argument} '{path}' is no readable {kind}: it is damaged, incomplete or of another kind."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{argument} '{path}' holds a {type(loaded).__name__}, not a dict of tensors.")
    lenient = "state_dict" in loaded
    state = loaded["state_dict"] if lenient else loaded
    return {k: v for k, v in state.items() if isinstance(v, Tensor)}, lenient
