"""Packages that not every installation has."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal


def import_extra(package: Literal["lmdb", "rasterio"], path: object) -> Any:
    """A package of the extra ``rs``.

    Args:
        package: its name.
        path: the file that needs it.

    Raises:
        ImportError: it is not installed; names the file that needs it and the extra that brings it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{path} must be read by {package}, which cannot be imported ({error}): "
            "pip install 'lightning-nrml[rs]'"
        ) from error
