"""Fixtures for tests that need two processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import GlooPool


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Two gloo processes: ``gloo_pool.run(fn, *args) -> [result of rank 0, result of rank 1]``."""
    pool = GlooPool()
    yield pool
    pool.close()
