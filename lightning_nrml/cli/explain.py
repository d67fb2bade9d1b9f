"""Turn an error of the parser, of Lightning's checks or of our own into one sentence."""

from __future__ import annotations

import ast
import opcode
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_nrml.cli.check import check_config, check_override, load_yaml, option_value
from lightning_nrml.cli.errors import UserError, nearest
from lightning_nrml.cli.foreign import foreign_sentence
from lightning_nrml.cli.recipes import config_arguments

PACKAGE = Path(__file__).resolve().parents[1]

RAISED_BY_US = (
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    OSError,
    FloatingPointError,
    ImportError,
)
EXPECTED = r"Expected an? (?:<class ')?([\w.\[\], ]+?)'?>?(?:[.:]|$)"


def written_for_users(error: BaseException) -> bool:
    """True for mistakes in a command, config or data file; False for what may be a bug.

    Errors of values and files that this package raises itself (the last line of the traceback is one of
    our ``raise`` statements) are written for users; the same types coming from anywhere else are not.
    """
    if isinstance(error, UserError | ArgumentError | MisconfigurationException):
        return True
    if isinstance(error, NotImplementedError) or not isinstance(error, RAISED_BY_US):
        return False
    return raised_by(error, PACKAGE.name)


def raised_by(error: BaseException, package: str) -> bool:
    """True if ``error`` comes from a ``raise`` statement in the files of the top-level ``package``."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return False
    name = str(frame.tb_frame.f_globals.get("__name__", ""))
    # the instruction, not the source line: the file may have been edited since it was imported
    raised = frame.tb_frame.f_code.co_code[frame.tb_lasti] == opcode.opmap["RAISE_VARARGS"]
    return name.split(".")[0] == package and raised


def user_error(error: BaseException) -> BaseException | None:
    """The error in the chain of ``error`` that was written for users, if any.

    The parser wraps what a constructor raises, so the cause is looked for first.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if isinstance(error, ArgumentError):
        return error
    return next((e for e in chain if written_for_users(e) or foreign_sentence(e)), None)


def explain(error: BaseException, args: Sequence[str]) -> str:
    """One sentence for ``error``; ``args`` are the (expanded) arguments of the command line."""
    if isinstance(error, ArgumentError):
        return _mistyped(args) or _parser_message(str(error), args)
    text = foreign_sentence(error) or str(error.args[0] if isinstance(error, KeyError) else error)
    return " ".join(text.split())


def _mistyped(args: Sequence[str]) -> str | None:
    """The first unknown key or class name in the config files or options of ``args``."""
    tree: dict[str, Any] = {}
    for _, value in config_arguments(args):
        path = Path(value)
        if not path.is_file():
            continue
        problems = check_config(path)
        if problems:
            return problems[0]
        tree = {**tree, **load_yaml(path)}
    for key, given in _overrides(args):
        _lay_over(tree, key, given)
        wrong = check_override(key, given, tree)
        if wrong:
            return wrong
    return None


def _lay_over(tree: dict[str, Any], key: str, given: str | None) -> None:
    """Put an option that names classes into the config: later options speak of these."""
    value = option_value(given)
    if key in ("model", "data") and given:
        tree[key] = value if isinstance(value, dict) else {"class_path": given}
    elif key.rstrip("+") == "trainer.callbacks":
        trainer = tree.get("trainer") or {}
        before = trainer.get("callbacks") or [] if key.endswith("+") else []
        entries = value if isinstance(value, list) else [value]
        tree["trainer"] = {**trainer, "callbacks": [*before, *entries]}


def _overrides(args: Sequence[str]) -> list[tuple[str, str | None]]:
    """``--key value`` and ``--key=value`` of a command line, without ``--config``."""
    found: list[tuple[str, str | None]] = []
    for i, arg in enumerate(args):
        if not arg.startswith("--") or arg.split("=")[0] == "--config":
            continue
        key, equals, value = arg[2:].partition("=")
        following = args[i + 1] if i + 1 < len(args) and not args[i + 1].startswith("--") else None
        found.append((key, value if equals else following))
    return found


def _parser_message(message: str, args: Sequence[str]) -> str:
    """The telling part of the parser's message; its wording may change, so the last way is generic."""
    if match := re.search(r"invalid choice: '?(.+?)'? \(choose from (.+)\)", message):
        verbs = re.findall(r"\w+", match[2])
        return f"there is no command '{match[1]}'; {nearest(match[1], [*verbs, 'inject', 'recipes'])}"
    keys = re.findall(r'Parser key "([^"]+)"', message)
    owner = re.findall(r"class_path '([^']+)'", message)
    where = ".".join(keys) + (f" ({owner[-1].rsplit('.', 1)[-1]})" if owner else "")
    if match := re.search(r"arguments are required: (.+)", message):
        missing = " and ".join(name.strip().removeprefix(f"{args[0]}.") for name in match[1].split(","))
        if owner:
            return f"{where} needs {missing}: set it under init_args."
        return f"'{args[0]}' still needs {missing}: give --config NAME (see 'nrml recipes ls') or set it."
    if match := re.search(r"Option '(?:init_args\.)?(.+?)' is not accepted", message):
        told = f"there is no argument '{match[1]}', or it takes another type"
        return f"{where}: {told}; see 'nrml {args[0]} --help'."
    inner = message.rsplit(f'Parser key "{keys[-1]}"', 1)[-1] if keys else message
    if match := re.search(r"Expected a dot import path string: (\S+)", inner):
        return f"{where}: there is no class '{match[1]}'; give a class name of this package or a.dotted.path."
    return _wrong_value(where, inner) or _leaves(where, inner)


def _wrong_value(where: str, message: str) -> str | None:
    """What a key accepts and what it was given, from the parser's part about that key."""
    given = re.findall(r"(?:Given value|Got value): (.*)", message)
    value = given[0].strip("'\"") if given else ""
    if nested := re.search(r"NestedArg\(key='(.+?)', val=(.+?)\)$", value):  # the parser's own words
        name, _, owner = where.partition(" ")
        value, where = nested[2].strip("'\""), f"{name}.{nested[1]} {owner}".rstrip()
        return f"{where} cannot be set to '{value}'; within a list, an option goes to the last entry."
    choices = [c for text in re.findall(r"Literal(\[.*?\])", message) for c in ast.literal_eval(text)]
    if choices:
        return f"{where} cannot be '{value}'; {nearest(value, map(str, choices), limit=20)}"
    found = re.findall(r"Not a valid subclass of (\w+)", message)
    found += re.findall(EXPECTED, message, flags=re.MULTILINE)
    expected = [name for name in dict.fromkeys(found) if name != "NoneType"]
    if where and expected and value:
        return f"{where} must be {' or '.join(expected)}, got '{value}'."
    return None


def _leaves(where: str, message: str) -> str:
    """The innermost errors of the parser's tree; its wording may change, so this is the last way."""
    lines = [line.strip(" -") for line in message.splitlines()]
    noise = ("Errors:", "Subtypes:", "Does not validate", "Given value", "Expected a <class", "Problem with")
    telling = [line for line in lines if line and not line.startswith(noise)]
    text = " ".join(telling or lines)
    return f"{where}: {text}" if where else text
