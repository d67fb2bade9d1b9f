"""The list of images that a run could not use."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HEADER = ("split", "index", "path", "reason")


@dataclass(frozen=True, slots=True)
class BadImageList:
    """A tab-separated file ``split index path reason`` that all ranks and loader processes write to.

    An image stands there once for each split, whoever meets it and however often. Missing images have no
    ``index``: they are left out before samples are counted.

    Args:
        file: the list; missing folders are made.
        split: ``train``, ``val`` or ``test``.
    """

    file: Path
    split: str

    def add(self, path: str, reason: str, index: int | None = None) -> None:
        """Write a line, unless the image is listed already.

        Args:
            path: what the image is called.
            reason: why it cannot be used; advice on how to go on is cut off, for the run goes on.
            index: its position in the split.
        """
        what, _, advice = reason.rpartition("; ")
        cells = (
            self.split,
            "" if index is None else str(index),
            path,
            what if "on_bad_image" in advice else reason,
        )
        line = [" ".join(cell.split()) for cell in cells]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+", encoding="utf-8") as file:
            _lock(file)  # until it is closed
            file.seek(0)
            there = [old.rstrip("\n").split("\t") for old in file]
            lines = [] if there else ["\t".join(HEADER)]
            if all((old[0], old[2]) != (line[0], line[2]) for old in there):
                lines.append("\t".join(line))
            file.writelines(f"{text}\n" for text in lines)


def _lock(file: IO[str]) -> None:
    """Keep other processes out, where the system can; without, a line may come twice."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
