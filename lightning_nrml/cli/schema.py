"""What arguments a class takes, read from its source: nothing is imported, so it is instant.

Serves ``nrml recipes validate`` (no torch) and the nearest-match hints of config errors.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
#: config key -> folders (of this package, of lightning.pytorch) whose classes may stand there
ROOMS = {
    "model": (("modules",), ()),
    "data": (("data",), ()),
    "callbacks": (("callbacks",), ("callbacks",)),
    "logger": (("cli",), ("loggers",)),
    "loss": (("losses",), ()),
    "filter": (("filters",), ()),
    "strategy": ((), ("strategies",)),
    "profiler": ((), ("profilers",)),
    "plugins": ((), ("plugins",)),
}
#: rooms that also hold helper classes: only names with this ending may be suggested
ENDINGS = {"data": "DataModule", "logger": "Logger", "strategy": "Strategy", "profiler": "Profiler"}


@dataclass(frozen=True)
class ClassInfo:
    """Arguments of a class: name -> classes named in its annotation; ``open`` = takes others too."""

    name: str
    params: dict[str, tuple[ClassInfo, ...]] = field(default_factory=dict)
    open: bool = False
    is_dataclass: bool = False


def find_module(dotted: str) -> Path | None:
    """The source file of ``a.b.c``; only the top-level package is located by the import system."""
    top, *rest = dotted.split(".")
    roots: list[Path] = [PACKAGE] if top == PACKAGE.name else []
    if not roots:
        roots = [Path(entry or ".", top) for entry in sys.path]
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        if spec is not None and spec.submodule_search_locations:
            roots += [Path(p) for p in spec.submodule_search_locations]
    for root in roots:
        path = root.joinpath(*rest)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def lightning_folder() -> Path | None:
    """The source folder of ``lightning.pytorch``, located without importing it."""
    init = find_module("lightning")
    return None if init is None else init.parent / "pytorch"


@cache
def class_files(room: str | None = None) -> dict[str, tuple[Path, ...]]:
    """Public top-level classes -> files, of one room (a key of ``ROOMS``) or of all."""
    ending = ENDINGS.get(room or "", "")
    rooms = [ROOMS[room]] if room else list(ROOMS.values())
    zoo = lightning_folder()
    folders = [PACKAGE / name for own, _ in rooms for name in own]
    folders += [zoo / name for _, theirs in rooms for name in theirs if zoo is not None]
    found: dict[str, tuple[Path, ...]] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
                if not name.startswith("_") and name.endswith(ending):
                    found[name] = (*found.get(name, ()), file)
    return found


def find_class(class_path: str, room: str | None = None) -> ClassInfo | None:
    """The class that ``class_path`` (short or dotted) names; ``None`` if there is none."""
    module, _, name = class_path.rpartition(".")
    if module:
        file = find_module(module)
        return None if file is None else _class_in(file, name)
    files = class_files(room).get(name, ()) or class_files().get(name, ()) or _already_imported(name)
    return next((info for file in files if (info := _class_in(file, name)) is not None), None)


def _already_imported(name: str) -> tuple[Path, ...]:
    """Files of classes that the user's own script brought in; short names reach these too."""
    files = []
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and str(file).endswith(".py") and isinstance(vars(module).get(name), type):
            files.append(Path(file))
    return tuple(files)


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Top-level statements, also those below ``if TYPE_CHECKING`` or ``try``."""
    flat: list[ast.stmt] = []
    for node in body:
        flat.append(node)
        if isinstance(node, ast.If | ast.Try):
            flat += _statements([*node.body, *node.orelse])
    return flat


def _class_in(file: Path, name: str, depth: int = 0) -> ClassInfo | None:
    """A class defined in ``file`` or imported there by name."""
    if depth > 8:  # re-export chains are short; cycles exist
        return None
    for node in _statements(_parse(file).body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _describe(file, node, depth)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = _import_source(file, node)
                    return None if source is None else _class_in(source, alias.name, depth + 1)
    return None


def _import_source(file: Path, node: ast.ImportFrom) -> Path | None:
    if not node.level:
        return find_module(node.module or "")
    base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _describe(file: Path, node: ast.ClassDef, depth: int) -> ClassInfo:
    decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
    bases = [_class_in(file, ast.unparse(b).split(".")[-1], depth + 1) for b in node.bases]
    params: dict[str, tuple[ClassInfo, ...]] = {}
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        named = [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs][1:]
        params = {a.arg: _annotated(file, a.annotation, depth) for a in named}
        inherits = init.args.kwarg is not None
    else:
        inherits = True
        if "dataclass" in decorators:
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            params = {ast.unparse(f.target): _annotated(file, f.annotation, depth) for f in fields}
    is_open = False
    if inherits:
        for base in bases:
            params = {**(base.params if base else {}), **params}
            is_open |= base is None or base.open
        # **kwargs that no base can take go somewhere we cannot see
        is_open |= init is not None and not bases
    return ClassInfo(node.name, params, is_open, "dataclass" in decorators)


def _annotated(file: Path, annotation: ast.expr | None, depth: int) -> tuple[ClassInfo, ...]:
    """Dataclasses that an annotation names, for checking nested settings."""
    if annotation is None or depth > 6:  # a datamodule may be three classes below the one that names it
        return ()
    names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    infos = (_class_in(file, name, depth + 1) for name in sorted(names) if name[:1].isupper())
    return tuple(info for info in infos if info is not None and info.is_dataclass)
