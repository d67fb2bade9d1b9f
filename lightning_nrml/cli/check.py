"""Check keys and class names of a config without importing what it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
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

COMMANDS = ("fit", "validate", "test", "predict", "audit")
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
    """Arguments of the trainer's ``fit/validate/test/predict/audit`` that a config may hold."""
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
    kind = {"data": "datamodule", "callbacks": "callback"}.get(room or "", room or "class")
    accepted = set(class_files(room))
    if module and (file := find_module(module)) is not None:
        text = file.read_text(encoding="utf-8")
        if re.search(rf"\b{re.escape(name)}\b", text):
            return None, None  # a factory function, or a class made at import: the source alone cannot tell
        accepted = {f"{module}.{c}" for c in re.findall(r"^class (\w+)", text, flags=re.MULTILINE)}
    return None, f"{where}: there is no {kind} '{class_path}'; {nearest(class_path, accepted)}"


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
                yield f"{where}.{key}: {info.name} has no argument '{key}'; {nearest(key, info.params)}"
                continue
            annotated = info.params.get(key, ())
        yield from _check_value(f"{where}.{key}", value, annotated)


def check_override(key: str, value: str | None, tree: dict[str, Any]) -> str | None:
    """The problem with ``--key value`` on top of the config ``tree``, if the key or class is unknown."""
    append = key.endswith("+")
    parts = key.rstrip("+").split(".")
    if parts[0] not in top_level_keys() | {"config", "print_config", "help"}:
        return f"--{key}: '{parts[0]}' is no config section; {nearest(parts[0], top_level_keys())}"
    if parts[0] in ("model", "data"):
        if len(parts) == 1 or parts[1:] == ["class_path"]:
            return check_class(parts[0], value)[1] if value and value[:1].isupper() else None
        section = tree.get(parts[0])
        class_path = section.get("class_path") if isinstance(section, dict) else section
        names = [p for p in parts[1:] if p != "init_args"]
        if class_path is None or names[0] in ("help", "dict_kwargs"):
            return None
        return _check_names(f"--{key}", names, find_class(str(class_path), parts[0]))
    named = (parts == ["trainer", "callbacks"] and append) or parts == ["trainer", "logger"]
    if named and value and value[:1].isupper():
        return check_class(".".join(parts), value)[1]
    owner = {"trainer": TRAINER, **OWN_SECTIONS}.get(parts[0])
    if owner is not None and len(parts) > 1:
        return _check_names(f"--{key}", parts[1:2], find_class(owner))
    return None


def _check_names(where: str, names: Sequence[str], info: ClassInfo | None) -> str | None:
    for name in names:
        if info is None or (info.open and name not in info.params):
            return None
        if name not in info.params:
            return f"{where}: {info.name} has no argument '{name}'; {nearest(name, info.params)}"
        nested = info.params[name]
        info = nested[0] if len(nested) == 1 else None
    return None
