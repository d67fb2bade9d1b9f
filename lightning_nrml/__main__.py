"""Entry point of ``nrml`` and ``python -m lightning_nrml``: quick answers first, heavy imports last."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_nrml import __version__

OVERVIEW = """\
nrml: noise-robust metric learning

  nrml fit      --config NAME|FILE [--KEY VALUE ...]           train
  nrml validate --config NAME|FILE --ckpt_path best|last|PATH  measure on the validation split
  nrml test     --config NAME|FILE --ckpt_path best|last|PATH  measure on the test split
  nrml predict  --config NAME|FILE --ckpt_path best|last|PATH  compute embeddings
  nrml embed    --ckpt_path RUN|FILE [--images FOLDER]         embeddings and a search index
  nrml export   --ckpt_path RUN|FILE --out FILE.onnx|FILE.pt   the net, for other programs
  nrml audit    --ckpt_path RUN|FILE                           rank wrong labels, write a report
  nrml audit    --ledger RUN|FILE                              the same from a run's ledger alone
  nrml inject   --config NAME|FILE --out FILE                  write noisy train labels as a table
  nrml recipes  ls | show NAME | cp NAME FILE | validate NAME|FILE

  nrml fit --help                      all options
  nrml fit --config NAME --print_config    the resolved config, without running it
  nrml --version

A later --config or --KEY wins over an earlier one; --trainer.callbacks+=NAME appends a callback.
NRML_DEBUG=1 shows the full traceback of user errors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments after the program name; ``None`` takes them from ``sys.argv``.

    Returns:
        Exit code: 0 = done, 2 = a user error, told in one sentence on stderr.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args in ([], ["-h"], ["--help"]):
        print(OVERVIEW)
        return 0
    if args[0] in ("--version", "-V"):
        print(f"nrml {__version__}")
        return 0
    if args[0] == "recipes":
        from lightning_nrml.cli.recipes import main as recipes_main

        return recipes_main(args[1:])
    if args[0] == "inject":
        from lightning_nrml.cli.inject import main as inject_main

        return inject_main(args[1:])
    if args[0] == "audit" and any(arg.partition("=")[0] == "--ledger" for arg in args):
        from lightning_nrml.cli.audit_ledger import main as ledger_main

        return ledger_main(args[1:])
    from lightning_nrml.cli.app import run

    return run(args)


def script() -> NoReturn:
    """:func:`main` for the shell: a reader such as ``head`` may close the pipe early."""
    try:
        code = main()
    except BrokenPipeError:
        # the interpreter flushes once more at exit, which would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    # looked up only now: W&B replaces it in main() to learn whether the run failed, which the
    # ``sys.exit(script())`` of an installed command, looked up before, would keep from it
    sys.exit(code)


if __name__ == "__main__":
    script()
