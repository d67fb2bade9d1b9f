"""Recipes: find, list, show, copy and check them without importing torch."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_nrml.cli.errors import UserError, nearest
from lightning_nrml.files import make_folder

PACKAGE = Path(__file__).resolve().parents[1]


def recipe_folder() -> Path:
    """The folder of recipes: next to the package in a checkout, inside the package in a wheel."""
    packaged, checkout = PACKAGE / "recipes", PACKAGE.parent / "recipes"
    return packaged if packaged.is_dir() else checkout


def recipes() -> dict[str, Path]:
    """Name (path below the recipe folder without ``.yaml``) -> file; folders with ``_`` are left out."""
    root = recipe_folder()
    files = sorted(root.rglob("*.yaml"))
    named = {path.relative_to(root).with_suffix("").as_posix(): path for path in files}
    return {name: path for name, path in named.items() if not name.startswith("_") and "/_" not in name}


def find_config(name: str) -> Path:
    """The file that ``--config name`` means: a path, a recipe's name, or the last part of one.

    Raises:
        UserError: nothing or more than one recipe has that name.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    bare = name.removesuffix(".yaml").removesuffix(".yml").removeprefix("recipes/")
    if bare in known:
        return known[bare]
    same_end = [full for full in known if full.rsplit("/", 1)[-1] == bare]
    if len(same_end) == 1:
        return known[same_end[0]]
    if same_end:
        raise UserError(f"'{name}' could be {' or '.join(same_end)}: give the full recipe name.")
    ends = {full.rsplit("/", 1)[-1] for full in known}
    hint = nearest(bare, {*known, *ends} if "/" not in bare else known)
    raise UserError(f"No config file or recipe is called '{name}': {hint} See 'nrml recipes ls'.")


def is_inline(config: str) -> bool:
    """Whether the value of ``--config`` is YAML itself and no name of a file or recipe."""
    return "\n" in config or ": " in config or config.startswith("{")


def config_arguments(args: Sequence[str]) -> list[tuple[int, str]]:
    """``(position, value)`` of every ``--config``/``-c`` in ``args``; values may be glued by ``=``."""
    found = []
    for i, arg in enumerate(args):
        if arg in ("--config", "-c") and i + 1 < len(args):
            found.append((i + 1, args[i + 1]))
        elif arg.startswith("--config="):
            found.append((i, arg.removeprefix("--config=")))
    return found


def option(args: Sequence[str], name: str) -> str | None:
    """The last value of ``--name value`` or ``--name=value`` in ``args``."""
    value = None
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(f"{name}="):
            value = arg.removeprefix(f"{name}=")
    return value


def changed(args: Sequence[str]) -> list[str]:
    """What ``args`` change against the config files, such as ``["trainer.max_epochs=3"]``."""
    found: list[str] = []
    for arg in args[1:]:
        if arg.startswith("--"):
            found.append(arg.removeprefix("--"))
        elif found and "=" not in found[-1]:
            found[-1] = f"{found[-1]}={arg}"
    return [item for item in found if item.partition("=")[0] not in ("config", "ckpt_path")]


def expand_configs(args: Sequence[str]) -> list[str]:
    """Replace recipe names after ``--config`` by their files; inline YAML is left alone.

    Raises:
        UserError: a name that is neither a file nor a recipe.
    """
    args = list(args)
    for i, value in config_arguments(args):
        if is_inline(value):
            continue
        path = str(find_config(value))
        args[i] = f"--config={path}" if args[i].startswith("--config=") else path
    return args


def header(path: Path) -> dict[str, str]:
    """The comment block that a recipe starts with: ``{"purpose": ..., "command": ..., ...}``."""
    fields: dict[str, str] = {}
    key = ""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        name, colon, value = text.partition(":")
        if colon and name.lower() in ("purpose", "command", "hardware", "expected"):
            key = name.lower()
            fields[key] = value.strip()
        elif key:
            fields[key] = f"{fields[key]} {text}".strip()
    return fields


def _list() -> int:
    known = recipes()
    if not known:
        raise UserError(f"No recipes found in {recipe_folder()}.")
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {header(path).get('purpose', '')}".rstrip())
    return 0


def _copy(name: str, target: Path, force: bool) -> int:
    source = find_config(name)
    target = target / source.name if target.is_dir() else target
    if target.exists() and not force:
        raise UserError(f"{target} exists: give another file name, or --force to overwrite it.")
    make_folder(target.parent)
    shutil.copyfile(source, target)
    print(f"Wrote {target}; train with: nrml fit --config {target}")
    return 0


def _validate(names: list[str]) -> int:
    from lightning_nrml.cli.check import check_config

    failed = False
    for name in names or list(recipes()):
        path = find_config(name)
        problems = check_config(path)
        missing = [f for f in ("purpose", "command", "hardware", "expected") if f not in header(path)]
        if missing and path in recipes().values():
            problems.append(f"the opening comment lacks '# {missing[0]}: ...'")
        failed |= bool(problems)
        print(f"{name}: {'ok' if not problems else ''}".rstrip())
        for problem in problems:
            print(f"  {problem}")
    return 2 if failed else 0


def main(args: Sequence[str]) -> int:
    """``nrml recipes ...``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nrml recipes", description="List, show, copy and check recipes.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("ls", help="names and purposes")
    show = verbs.add_parser("show", help="print a recipe")
    show.add_argument("name")
    copy = verbs.add_parser("cp", help="copy a recipe to change it")
    copy.add_argument("name")
    copy.add_argument("target", type=Path)
    copy.add_argument("--force", action="store_true", help="overwrite the target")
    validate = verbs.add_parser("validate", help="check keys and class names of recipes or config files")
    validate.add_argument("names", nargs="*", help="default: all recipes")
    parsed = parser.parse_args(list(args))
    try:
        if parsed.verb == "ls":
            return _list()
        if parsed.verb == "show":
            print(find_config(parsed.name).read_text(), end="")
            return 0
        if parsed.verb == "cp":
            return _copy(parsed.name, parsed.target, parsed.force)
        return _validate(parsed.names)
    except (UserError, OSError) as error:
        print(f"nrml: {error}", file=sys.stderr)
        return 2
