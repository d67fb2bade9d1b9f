"""Where a run writes, and which checkpoint ``best``, ``last`` or a path means. No heavy imports."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_nrml.cli.check import load_yaml
from lightning_nrml.cli.errors import UserError
from lightning_nrml.cli.recipes import config_arguments, option
from lightning_nrml.files import make_folder

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

CHECKPOINTS = "checkpoints"
NAMED_CHECKPOINTS = ("best", "last", "init")
NEEDS_CHECKPOINT = ("validate", "test", "predict", "audit", "embed", "export")


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


def check_writable(folder: Path, option: str = "--trainer.default_root_dir") -> None:
    """See, without making it, that ``folder`` can be written to.

    Raises:
        UserError: it or the nearest folder above it is a file or may not be written; names the ``option``
            that sets another place.
    """
    mend = f"name another place with {option}."
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir():
        raise UserError(f"the folder {folder} cannot be made: {there} is a file; {mend}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the folder {folder} cannot be written: {there} is read-only for you; {mend}")


class FolderClaim:
    """Keeps two processes from training in one run folder, where their checkpoints and metrics would mix.

    A lock of the operating system on the folder itself: it goes with the process, however that ends. File
    systems that know no locks are not guarded.
    """

    def __init__(self) -> None:
        self._handle: int | None = None

    def take(self, folder: Path) -> None:
        """Claim ``folder``, which is made if it is missing; nothing happens if it was claimed before.

        Raises:
            UserError: another run has it.
        """
        if self._handle is not None or fcntl is None:
            return
        make_folder(folder)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"another run is training in {folder} now, and would share checkpoints and metrics with this "
                "one: name another place with --trainer.default_root_dir, or wait until it has ended."
            ) from None
        except OSError:
            os.close(handle)
            return
        self._handle = handle

    def release(self) -> None:
        """Let other runs in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def with_run(args: list[str]) -> list[str]:
    """Complete a command that names a run by ``--ckpt_path`` alone.

    The folder of a run means its best checkpoint, and its last one to go on training. Without
    ``--config``, the ``config.yaml`` of the run is used, and the run folder is the one that it was found in:
    it may have been moved.

    Raises:
        UserError: there is no such run or file, or it has no checkpoint.
    """
    value = option(args, "--ckpt_path")
    if value is None or value in NAMED_CHECKPOINTS or "://" in value:
        return args
    path, has_config = Path(value), bool(config_arguments(args))
    is_file = path.suffix == ".ckpt"
    if not path.exists() and not (has_config and is_file):  # that is told with what the run folder has
        raise UserError(f"--ckpt_path finds nothing: there is no {'file' if is_file else 'run'} {path}.")
    if path.is_dir():
        path = checkpoint_of_run(path, ("last", "best") if args[0] == "fit" else ("best", "last"))
        args = [*args, f"--ckpt_path={path}"]
    config = path.parent.parent / "config.yaml"
    if has_config or not (path.is_file() and config.is_file()):
        return args
    found = ["--config", str(config), "--trainer.default_root_dir", str(config.parent)]
    return [args[0], *found, *args[1:]]


def checkpoint_of_run(folder: Path, names: tuple[str, ...] = ("best", "last")) -> Path:
    """The first of these checkpoints that the run in ``folder`` has.

    Raises:
        UserError: it has neither.
    """
    found = (folder / CHECKPOINTS / f"{name}.ckpt" for name in names)
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} has no checkpoint yet: there is neither best.ckpt nor last.ckpt in "
            f"{folder / CHECKPOINTS}; train with 'nrml fit', or name a checkpoint file."
        )
    return path
