"""Files that are there as a whole or not at all, and lists of names."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        OSError: it cannot be made; says what is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
        why = f"{there} is a file" if there.is_file() else error.strerror
        raise OSError(f"the folder {folder} cannot be made: {why}; name another place.") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``: takes its place when the block ends, and goes if the block fails.

    Whoever reads ``path`` meets the old content or the new one, also after a kill. The name is new each time,
    so writers do not collide, and it keeps the suffix that some libraries go by. Missing folders are made.

    Raises:
        OSError: see :func:`make_folder`.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)  # the same folder, so the same file system
    finally:
        part.unlink(missing_ok=True)


def read_lines(path: Path) -> list[str]:
    """Lines of a text file in UTF-8, with or without the mark that Windows programs put before it, stripped.

    Raises:
        ValueError: another encoding; names the file.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); save it so"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, see :func:`whole_file`."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a ``.csv`` file, or else a Parquet one, see :func:`whole_file`."""
    with whole_file(path) as part:
        if path.suffix.lower() == ".csv":
            frame.to_csv(part, index=False)
        else:
            frame.to_parquet(part, index=False)
