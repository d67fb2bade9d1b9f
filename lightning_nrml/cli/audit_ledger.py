"""``nrml audit --ledger FILE``: an audit from a run's ledger alone; needs neither model nor data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_nrml.cli.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def main(args: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="nrml audit", description="Audit from a noise ledger. See also: nrml audit --help (checkpoint)."
    )
    parser.add_argument(
        "--ledger",
        required=True,
        help="the run's folder, or a ledger in it; of a multi-label run noise_ledger_labels.parquet",
    )
    parser.add_argument("--out", help="folder to write to; default: audit_ledger beside the ledger")
    parser.add_argument("--images", help="folder that the ledger's images are in, for thumbnails")
    parser.add_argument("--gallery", type=int, default=200, help="samples with images in the report")
    parser.add_argument(
        "--rule",
        choices=("drop", "relabel"),
        default="drop",
        help="what happens to doubted labels; a ledger can relabel those of multi-label data only",
    )
    parser.add_argument("--review", help="CSV that was saved from a report; its marks win")
    parsed = parser.parse_args(list(args))
    try:
        return _run(parsed)
    except (UserError, ValueError, OSError) as error:
        print(f"nrml: {error}", file=sys.stderr)
        return 2


def _run(parsed: argparse.Namespace) -> int:
    from lightning_nrml.audit import AuditOptions, audit_ledger

    ledger = find_ledger(Path(parsed.ledger))
    options = AuditOptions(rule=parsed.rule, gallery=parsed.gallery, review=parsed.review)
    pixels = None if parsed.images is None else partial(_load, Path(parsed.images))
    folder = Path(parsed.out) if parsed.out else ledger.parent / "audit_ledger"
    result = audit_ledger(ledger, folder, options, pixels)
    for name in ("report", "table", "rates", "corrected"):
        if name in result.files:
            print(f"{name:<10} {result.files[name]}")
    return 0


def find_ledger(path: Path) -> Path:
    """The ledger file that a file or the folder of a run means.

    Raises:
        UserError: there is none.
    """
    found = path / "noise_ledger.parquet" if path.is_dir() else path
    if not found.is_file():
        raise UserError(
            f"--ledger {path} finds nothing: {found} does not exist; train with a noise filter, whose run "
            "folder then has one, or audit a checkpoint with --ckpt_path."
        )
    return found


def _load(root: Path, names: list[str]) -> np.ndarray:
    """uint8 ``(n, C, 96, 96)``."""
    from lightning_nrml.data.multilabel_rs import image_source
    from lightning_nrml.data.multilabel_tables import find_images
    from lightning_nrml.data.sources import PICTURE, BadImageError, FileSource

    rows, files = range(len(names)), [str(file) for file in find_images(names, root, once=False)]
    try:
        try:
            return FileSource(files, 3, PICTURE).get(rows).numpy()
        except BadImageError:  # no pictures: rasters, if the first one is
            return image_source(files, None, PICTURE).pictures(rows).numpy()
    except BadImageError as error:
        raise UserError(f"--images {root} does not fit the ledger: {error}") from error
