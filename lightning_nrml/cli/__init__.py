"""The command line. Importing this package is cheap; torch comes in with :class:`NRMLCLI`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_nrml.cli.app import NRMLCLI

__all__ = ["NRMLCLI"]


def __getattr__(name: str) -> Any:
    if name == "NRMLCLI":
        from lightning_nrml.cli.app import NRMLCLI

        return NRMLCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
