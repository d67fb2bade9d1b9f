"""``null`` for an argument of an argument on the command line."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

MODE = "omegaconf"


@cache
def understand_nested_null() -> None:
    """Let ``--data.init_args.train_view.init_args.mean null`` mean what it says.

    jsonargparse hands such a value on from level to level as Python's text, so that it arrives as ``None``,
    which is no YAML. A value that is this text and nothing else is the null now.
    """
    ArgumentParser(parser_mode=MODE).parse_string("{}")  # makes the loader
    load = get_loader(MODE)

    def load_value(value: str) -> Any:
        return None if isinstance(value, str) and value.strip() == "None" else load(value)

    set_loader(MODE, load_value, (yaml.YAMLError,))
