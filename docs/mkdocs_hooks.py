"""Site build: Sphinx roles in docstrings (``:class:`~a.b.C```) become plain code (``C``)."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|mod|attr):\s*<code>~?(?:[\w]*\.)*(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with each page's HTML."""
    return ROLE.sub(r"<code>\1</code>", html)
