"""A look into a checkpoint file before anything heavy is built."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_nrml.cli.errors import UserError
from lightning_nrml.cli.save_config import RunConfig


def check_checkpoint(ckpt_path: str) -> None:
    """See that a local file is a whole checkpoint, before minutes go into building data and model.

    Raises:
        UserError: it is not; says what it is instead.
    """
    path = Path(ckpt_path)
    if "://" in ckpt_path:
        return
    if not path.is_file():
        raise UserError(f"--ckpt_path {path} is a folder; name a checkpoint file in it, such as last.ckpt.")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"--ckpt_path {path} is no whole checkpoint: it is incomplete or another kind of file; "
            "give another one (best.ckpt or last.ckpt of the run)."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError):  # holds more than tensors: Lightning decides
        return
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise UserError(
            f"--ckpt_path {path} holds no Lightning checkpoint; if these are bare weights, start from them "
            "with --model.init_weights."
        )


def saved_by_run(ckpt_path: str, weights_only: bool | None = None) -> Mapping[str, Any]:
    """What :class:`RunConfig` kept in a checkpoint: W&B run id and SLURM job.

    Args:
        ckpt_path: a whole checkpoint (:func:`check_checkpoint`).
        weights_only: as Lightning's ``fit`` has it; ``False`` reads pickled objects, too.
    """
    content = torch.load(ckpt_path, map_location="cpu", weights_only=weights_only is not False, mmap=True)
    state: Mapping[str, Any] = content.get("callbacks", {}).get(RunConfig.__qualname__, {})
    return state
