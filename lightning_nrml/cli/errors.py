"""One error type for everything a user can mend, and one way to suggest the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a command or config that the message tells how to mend; shown without traceback."""


def nearest(name: str, accepted: Iterable[str], limit: int = 8) -> str:
    """``"did you mean 'x'?"`` for a close match, else ``"accepted: a, b, ..."`` (up to ``limit``)."""
    names = sorted(set(accepted))
    folded = {n.lower(): n for n in reversed(names)}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{folded[close[0]]}'?"
    if not names:
        return "nothing is accepted here."
    more = ", ..." if len(names) > limit else ""
    return f"accepted: {', '.join(names[:limit])}{more}."
