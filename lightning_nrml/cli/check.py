"""Check keys and class names of a config without importing what it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_nrml.cli.errors import UserError, nearest
from lightning_nrml.cli.schema import (
    ROOMS,
    ClassInfo,
    class_files,
    find_class,
    find_module,
    lightning_folder,
)

COMMANDS = ("fit", "validate", "test", "predict", "audit", "embed", "export")
OWN_SECTIONS = {
    "checkpoint_last": "lightning_nrml.callbacks.checkpoint.LastCheckpoint",
    "checkpoint_best": "lightning_nrml.callbacks.checkpoint.BestCheckpoint",
    "run_card": "lightning_nrml.callbacks.run_card.RunCard",
}
#: rooms whose classes may be given by name alone
NAMED = ("model", "data", "callbacks", "logger", "loss", "filter")
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"


def load_yaml(path: Path) -> dict[str, Any]:
    """The config as nested dicts; keys with dots are opened up.

    Raises:
        UserError: the file is no YAML mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: this is not valid YAML ({error.problem}).") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys, not a {type(tree).__name__}.")
    return _nested(tree)


def _nested(tree: dict[Any, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        *parents, leaf = str(key).split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        value = _nested(value) if isinstance(value, dict) else value
        both = isinstance(value, dict) and isinstance(node.get(leaf), dict)
        node[leaf] = {**node[leaf], **value} if both else value
    return out


def check_config(path: Path) -> list[str]:
    """Sentences about every unknown key or class name of a config file; empty if there is none."""
    try:
        return [f"{path}: {problem}" for problem in check_tree(load_yaml(path))]
    except UserError as error:
        return [str(error)]


@cache
def _method_arguments() -> frozenset[str]:
    """Arguments of the trainer's verbs that a config may hold."""
    folder = lightning_folder()
    files = [Path(__file__).with_name("trainer.py")]
    files += [] if folder is None else [folder / "trainer" / "trainer.py"]
    names = {"ckpt_path"}
    for file in filter(Path.is_file, files):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in COMMANDS:
                names |= {a.arg for a in node.args.args}
    loaders = {"self", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
    return frozenset(names - loaders)


def top_level_keys() -> set[str]:
    """Keys that may stand at the top of a config."""
    return {"seed_everything", "trainer", "model", "data", *OWN_SECTIONS, *_method_arguments()}


def check_tree(tree: dict[str, Any]) -> Iterator[str]:
    """Problems of a whole config, in its order."""
    for key, value in tree.items():
        if key in COMMANDS and isinstance(value, dict):
            yield from check_tree(value)
        elif key not in top_level_keys():
            yield f"'{key}' is no config section; {nearest(key, top_level_keys())}"
        elif key == "trainer" and isinstance(value, dict):
            yield from _check_arguments("trainer", value, find_class(TRAINER))
        elif key in OWN_SECTIONS and isinstance(value, dict):
            yield from _check_arguments(key, value, find_class(OWN_SECTIONS[key]))
        elif key in ("model", "data"):
            yield from _check_value(key, value)


def room_of(where: str) -> str | None:
    """The key of ``ROOMS`` that the config key ``where`` (dotted, list positions allowed) stands for."""
    names = [part for part in where.split(".") if not part.isdigit() and part != "init_args"]
    return names[-1] if names and names[-1] in ROOMS else None


def check_class(where: str, class_path: str) -> tuple[ClassInfo | None, str | None]:
    """``(class, None)``, or ``(None, problem)`` for a name that cannot be found."""
    room = room_of(where)
    info = find_class(class_path, room)
    if info is not None:
        return info, None
    module, _, name = class_path.rpartition(".")
    if module and (file := find_module(module)) is not None:
        text = file.read_text(encoding="utf-8")
        if re.search(rf"\b{re.escape(name)}\b", text):
            return None, None  # a factory function, or a class made at import: the source alone cannot tell
        classes = re.findall(r"^class (\w+)", text, flags=re.MULTILINE)
        hint = nearest(name, classes)
        if classes and not hint.startswith("accepted"):
            hint = f"it has {', '.join(sorted(classes))}; {hint}"
        return None, f"{where}: module '{module}' has no class '{name}'; {hint}"
    kind = {"data": "datamodule", "callbacks": "callback"}.get(room or "", room or "class")
    return None, f"{where}: there is no {kind} '{class_path}'; {nearest(class_path, class_files(room))}"


def _check_value(where: str, value: Any, annotated: Sequence[ClassInfo] = ()) -> Iterator[str]:
    """A value that may be ``{class_path, init_args}``, a class name, a list of them, or a dataclass."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _check_value(f"{where}.{i}", item, annotated)
    elif isinstance(value, str):
        if room_of(where) in NAMED and value[:1].isupper():
            problem = check_class(where, value)[1]
            if problem:
                yield problem
    elif isinstance(value, dict) and "class_path" in value:
        unknown = set(value) - {"class_path", "init_args", "dict_kwargs"}
        for key in sorted(unknown):
            yield (
                f"{where}.{key}: beside class_path only init_args and dict_kwargs are allowed; "
                f"{nearest(key, ('class_path', 'init_args', 'dict_kwargs'))}"
            )
        info, problem = check_class(where, str(value["class_path"]))
        if problem:
            yield problem
        init = value.get("init_args")
        if isinstance(init, dict):
            yield from _check_arguments(f"{where}.init_args", init, info)
        elif init is not None:
            yield f"{where}.init_args: must be a mapping of arguments, got '{init}'"
    elif isinstance(value, dict) and len(annotated) == 1:
        yield from _check_arguments(where, value, annotated[0])


def _check_arguments(where: str, values: dict[str, Any], info: ClassInfo | None) -> Iterator[str]:
    for key, value in values.items():
        annotated: tuple[ClassInfo, ...] = ()
        if info is not None:
            if key not in info.params and not info.open:
                yield _unknown(f"{where}.{key}", key, info)
                continue
            annotated = info.params.get(key, ())
        yield from _check_value(f"{where}.{key}", value, annotated)


def _unknown(where: str, key: str, info: ClassInfo) -> str:
    hint = nearest(key, info.params)
    passed_on = "kwargs" in info.params and not hint.startswith("did you mean")
    aside = " (options that it passes on go under 'kwargs')" if passed_on else ""
    return f"{where}: {info.name} has no argument '{key}'{aside}; {hint}"


def check_override(key: str, value: str | None, tree: dict[str, Any]) -> str | None:
    """The problem with ``--key value`` on top of the config ``tree``, if a key or class is unknown."""
    parts = key.rstrip("+").split(".")
    if parts == ["images"]:
        return "--images belongs to --ledger; with --ckpt_path the audit takes the images from the data."
    if parts[0] not in top_level_keys() | {"config", "print_config", "help"}:
        return f"--{key}: '{parts[0]}' is no config section; {nearest(parts[0], top_level_keys())}"
    found = _walk(f"--{key}", *_owner(parts, tree))
    if isinstance(found, str):
        return found
    if value and _names_class(parts, value):
        return check_class(".".join(parts).removesuffix(".class_path"), value)[1]
    content = option_value(value)
    if not isinstance(content, dict | list):
        return None
    problem = next(_check_value(".".join(parts), content, (found,) if found else ()), None)
    return f"--{problem}" if problem else None


def _names_class(parts: list[str], value: str) -> bool:
    """Whether an option's text is a class name, short or dotted, that can be looked up."""
    places = (["model"], ["data"], ["trainer", "callbacks"], ["trainer", "logger"])
    named = parts in places or (parts[-1] == "class_path" and parts[0] in ("model", "data", "trainer"))
    return named and (value[0].isupper() or "." in value) and value.replace(".", "").isidentifier()


def option_value(value: str | None) -> Any:
    """What an option's text means: a mapping or list in YAML, else the text itself."""
    if value and value[0] in "{[":
        with suppress(yaml.YAMLError):
            return yaml.safe_load(value)
    return value


def _owner(parts: list[str], tree: dict[str, Any]) -> tuple[list[str], ClassInfo | None]:
    """The names within a class that an option's key leads to, and the class."""
    section = tree.get(parts[0])
    if parts[0] in ("model", "data"):
        names = [p for p in parts[1:] if p not in ("init_args", "class_path")]
        return (
            ([], None) if names[:1] in (["help"], ["dict_kwargs"]) else (names, _class_of(section, parts[0]))
        )
    if parts[:2] == ["trainer", "callbacks"] and len(parts) > 2:
        callbacks = section.get("callbacks") if isinstance(section, dict) else None
        last = callbacks[-1] if isinstance(callbacks, list) and callbacks else callbacks
        names = [p for p in parts[2:] if p not in ("init_args", "class_path")]
        return (names, _class_of(last, "callbacks")) if names else ([], None)
    owner = {"trainer": TRAINER, **OWN_SECTIONS}.get(parts[0])
    return (parts[1:2], find_class(owner)) if owner else ([], None)


def _class_of(entry: Any, room: str) -> ClassInfo | None:
    class_path = entry.get("class_path") if isinstance(entry, dict) else entry
    return find_class(class_path, room) if isinstance(class_path, str) else None


def _walk(where: str, names: Sequence[str], info: ClassInfo | None) -> str | ClassInfo | None:
    """The settings class that ``names`` lead to, or the problem with one of them."""
    for name in names:
        if info is None or (info.open and name not in info.params):
            return None
        if name not in info.params:
            return _unknown(where, name, info)
        nested = info.params[name]
        info = nested[0] if len(nested) == 1 else None
    return info
