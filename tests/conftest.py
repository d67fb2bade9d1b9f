"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
