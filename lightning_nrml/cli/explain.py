"""Turn a parser's or our own error into one sentence."""

from __future__ import annotations

from lightning_nrml.cli.errors import UserError


def is_user_error(error):
    return isinstance(error, UserError)


def explain(error, args):
    return str(error)
