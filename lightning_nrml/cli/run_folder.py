"""Where a run writes, and which checkpoint ``best``, ``last`` or a path means. No heavy imports."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_nrml.cli.check import load_yaml
from lightning_nrml.cli.errors import UserError

CHECKPOINTS = "checkpoints"
NEEDS_CHECKPOINT = ("validate", "test", "predict", "audit")


def default_run_folder(configs: list[str], model: str, data: str) -> Path:
    """``runs/<stem of the last config file>``, or ``runs/<model>_<data>`` without a config file."""
    if configs:
        last = Path(configs[-1])
        # a run's own config.yaml names the run by its folder
        return Path("runs") / (last.parent.name if last.stem == "config" else last.stem)
    short = [name.rsplit(".", 1)[-1].lower() for name in (model, data) if name]
    return Path("runs") / "_".join(short)


def saved_roots(configs: list[str]) -> list[Path]:
    """The ``trainer.default_root_dir`` that each of the config files names, where it does."""
    trees = [load_yaml(Path(config)) for config in configs if Path(config).is_file()]
    sections = [tree.get("trainer") for tree in trees]
    roots = [section.get("default_root_dir") for section in sections if isinstance(section, dict)]
    return [Path(root) for root in roots if root]


def resolve_checkpoint(command: str, ckpt_path: str | None, run_folder: Path) -> str | None:
    """The file that ``--ckpt_path`` means, checked to exist.

    Args:
        command: subcommand; ``fit`` may go without a checkpoint, evaluation may not.
        ckpt_path: a path, ``best`` or ``last`` (in the run folder), ``init`` (evaluate the weights that
            the config starts from, e.g. a pretrained backbone), or ``None``.
        run_folder: ``trainer.default_root_dir``.

    Returns:
        A path, or ``None`` to use the initial weights.

    Raises:
        UserError: if evaluation has no checkpoint, or the named one does not exist.
    """
    if ckpt_path is None:
        if command in NEEDS_CHECKPOINT:
            raise UserError(
                f"'{command}' needs --ckpt_path: give 'best' or 'last' (looked up in "
                f"{run_folder / CHECKPOINTS}), a checkpoint file, or 'init' to evaluate the untrained model."
            )
        return None
    if ckpt_path == "init":
        if command == "fit":
            raise UserError("'fit' starts from the initial weights anyway; leave out --ckpt_path init.")
        return None
    path = (
        run_folder / CHECKPOINTS / f"{ckpt_path}.ckpt" if ckpt_path in ("best", "last") else Path(ckpt_path)
    )
    if path.exists():
        return str(path)
    if "://" in ckpt_path:  # remote files are checked by the reader
        return ckpt_path
    folder = path.parent
    there = sorted(p.name for p in folder.glob("*.ckpt")) if folder.is_dir() else []
    found = f"that folder has {', '.join(there)}" if there else "that folder has no checkpoint"
    mend = (
        "leave out --ckpt_path to start a new run, or set --trainer.default_root_dir to the run to continue."
        if command == "fit"
        else "train first with 'nrml fit', or set --trainer.default_root_dir to the run to evaluate."
    )
    raise UserError(f"--ckpt_path {ckpt_path} finds nothing: {path} does not exist ({found}); {mend}")


def check_writable(folder: Path) -> None:
    """See, without making it, that ``folder`` can be written to.

    Raises:
        UserError: it or the nearest folder above it is a file or may not be written.
    """
    mend = "name another place with --trainer.default_root_dir."
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir():
        raise UserError(f"the run folder {folder} cannot be made: {there} is a file; {mend}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the run folder {folder} cannot be written: {there} is read-only for you; {mend}")


def config_beside(ckpt_path: str) -> Path | None:
    """``<run>/config.yaml`` of a checkpoint ``<run>/checkpoints/x.ckpt``, if it is there."""
    config = Path(ckpt_path).parent.parent / "config.yaml"
    return config if Path(ckpt_path).is_file() and config.is_file() else None


def checkpoint_of_run(folder: Path) -> Path | None:
    """``best.ckpt``, else ``last.ckpt`` of the run in ``folder``."""
    found = (folder / CHECKPOINTS / name for name in ("best.ckpt", "last.ckpt"))
    return next((path for path in found if path.is_file()), None)
