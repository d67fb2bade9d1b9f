"""``nrml audit --ledger FILE``: an audit from a run's ledger alone; needs neither model nor data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
    parser.add_argument("--ledger", required=True, help="noise_ledger.parquet or .csv, or the run's folder")
    parser.add_argument("--out", help="folder to write to; default: audit beside the ledger")
    parser.add_argument("--images", help="folder that the ledger's paths are relative to, for thumbnails")
    parser.add_argument("--gallery", type=int, default=200, help="samples with images in the report")
    parser.add_argument("--review", help="CSV that was saved from a report; its marks win")
    parsed = parser.parse_args(list(args))
    try:
        return _run(parsed)
    except (UserError, ValueError, FileNotFoundError) as error:
        print(f"nrml: {error}", file=sys.stderr)
        return 2


def _run(parsed: argparse.Namespace) -> int:
    from lightning_nrml.audit import AuditData, AuditOptions, audit_ledger, from_ledger

    ledger = find_ledger(Path(parsed.ledger))
    options = AuditOptions(gallery=parsed.gallery, review=parsed.review)
    data = None
    if parsed.images is not None:
        import torch

        frame = from_ledger(ledger).sort_values("index")
        if "path" not in frame.columns:
            raise UserError(f"--images: the ledger {ledger} has no paths; leave out --images.")
        paths = [Path(parsed.images, p) for p in frame["path"]]
        label = torch.from_numpy(frame["label"].to_numpy(copy=True))
        data = AuditData(label, int(label.max()) + 1, images=lambda rows: _load(paths, rows))
    folder = Path(parsed.out) if parsed.out else ledger.parent / "audit"
    result = audit_ledger(ledger, folder, options, data)
    for name in ("report", "table", "corrected"):
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


def _load(paths: list[Path], rows: np.ndarray) -> np.ndarray:
    """uint8 ``(n, 3, 96, 96)``."""
    from lightning_nrml.data.sources import FileSource

    return FileSource([paths[i] for i in rows], image_size=96).get(range(len(rows))).numpy()
