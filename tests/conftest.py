"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The nets are tiny: on a busy machine a second thread only waits for the first. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data():
    """Function name -> path of a real data folder; skips with a reason where it is absent."""
    root = Path(os.environ.get("NRML_DATA", REPO.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"real data '{name}' not found under {root}; set NRML_DATA to its parent folder")
        return path

    return find
