"""Write METHODS.md: one row per module, filter and loss, from docstrings, recipes, tests and measured runs.

python docs/make_methods.py            # write
python docs/make_methods.py --check    # exit code 1 if METHODS.md is out of date
"""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
CSV = REPO / "docs" / "benchmarks" / "noise_runs.csv"
SSL_CSV = REPO / "docs" / "benchmarks" / "ssl_runs.csv"
TARGET = REPO / "METHODS.md"
ROOMS = {"modules": "EmbeddingModule", "filters": "NoiseFilter", "losses": "Loss"}
SETTINGS = {
    "digits_50": "digits 50 %",
    "omniglot_50": "Omniglot 50 %",
    "caltech101_50": "caltech101 50 %",
    "cifar10n_worse": "CIFAR-10N worse",
}
#: class -> methods of the CSV whose runs measure it, and what tells them apart
MEASURED = {
    "PRISM": {
        "prism_avg": "avg",
        "prism_vmf": "vmf",
        "prism_vmf_shared": "vmf, one kappa",
        "shuffled_combined_prism": "avg, with cross-entropy, shuffled batches",
    },
    "Consensus": {
        "consensus": "with 0.3 cross-entropy",
        "shuffled_consensus": "with cross-entropy, shuffled batches",
    },
    "BARE": {"bare": "on cross-entropy"},
    "SmallLoss": {"small_loss": "on cross-entropy", "shuffled_small_loss": "the same, shuffled"},
    "LossQuantile": {"loss_quantile": "on cross-entropy"},
    "KNNVote": {"knn_vote": "k nearest"},
    "TSINT": {"tsint": "pairs"},
    "FixedFilter": {"known_clean": "known clean"},
    "MetricLearning": {"none": "no filter"},
    "ContrastiveLoss": {"none": "no filter"},
    "CrossBatchContrastiveLoss": {"none": "no filter"},
    "CosineSoftmaxLoss": {"cross_entropy": "no filter", "shuffled_cross_entropy": "no filter, shuffled"},
    "EAC": {"eac": "as the recipe", "eac_off": "without the agreement"},
    "EACLoss": {"eac": "as the recipe", "eac_off": "without the agreement"},
}
#: class -> method of the CSV of self-supervised runs
PRETRAINED = {"SimCLR": "simclr", "MoCo": "moco", "MoCHi": "mochi", "BYOL": "byol", "SwAV": "swav"}
#: what the paper reports; its data sets and nets differ from ours, so these are not targets
PAPER = {
    "PRISM": (
        "P@1 at 50 % symmetric noise, contrastive loss alone → with PRISM (avg): CARS 46.9 → 72.9, "
        "SOP 67.2 → 72.9, CUB 31.2 → 56.0"
    ),
}
HEAD = """# Methods

Written by `python docs/make_methods.py`; do not edit. A test fails if this file is out of date, or if a
module or filter lacks a recipe, a mention in the docs, or a test that asserts numbers.

* **status**: `measured` = numeric test and benchmark runs; `tested` = numeric test, no benchmark run yet.
* **measured**: Recall@1 / MAP@R of the last epoch, mean over the seeds in
  `docs/benchmarks/noise_runs.csv` (number of seeds in brackets); for self-supervised methods kNN and
  linear top-1 from `ssl_runs.csv`. Protocols: `docs/benchmarks.md`.
* **paper**: as reported there, on other data sets with pre-trained nets, so not comparable with ours;
  read second-hand.
"""


@dataclass(frozen=True)
class Method:
    """One public class and what the repository says about it."""

    name: str
    room: str
    purpose: str
    recipes: list[str]
    tests: list[str]
    measured: str
    paper: str

    @property
    def status(self) -> str:
        """``measured``, ``tested``, or what is missing."""
        if not self.tests:
            return "no numeric test"
        return "measured" if self.measured else "tested"


def public_classes(room: str) -> list[type]:
    """The classes that a room exports, without its base class."""
    package = import_module(f"lightning_nrml.{room}")
    found = (getattr(package, name) for name in package.__all__ if name != ROOMS[room])
    return [item for item in found if inspect.isclass(item)]


def mentions(name: str, text: str) -> bool:
    """Whether a class name occurs as a whole word."""
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


@cache
def text_of(path: Path) -> str:
    """A file's text, read once."""
    return path.read_text(encoding="utf-8")


@cache
def built_by() -> dict[str, set[str]]:
    """Class of the package -> names that it calls: a thin callback's filter, or a module's default."""
    calls: dict[str, set[str]] = {}
    for path in [*REPO.glob("lightning_nrml/callbacks/*.py"), *REPO.glob("lightning_nrml/modules/*.py")]:
        for node in ast.parse(text_of(path)).body:
            if isinstance(node, ast.ClassDef):
                called = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
                calls[node.name] = {ast.unparse(f) for f in called if isinstance(f, ast.Attribute | ast.Name)}
    return calls


def used_by(name: str) -> set[str]:
    """Classes of the package that build ``name`` themselves."""
    spelled = {name, f"filters.{name}", f"losses.{name}"}
    return {user for user, called in built_by().items() if called & spelled}


def recipes_of(name: str) -> list[str]:
    """Recipes, their comments aside, and benchmark commands that name the class or one that builds it."""
    names = {name} | used_by(name)
    files = sorted([*REPO.glob("recipes/**/*.yaml"), *REPO.glob("recipes/**/*.py")])
    said = {p: re.sub(r"(?m)#.*", "", text_of(p)) if p.suffix == ".yaml" else text_of(p) for p in files}
    hits = [p for p in files if any(mentions(n, said[p]) for n in names)]
    return [p.relative_to(REPO / "recipes").as_posix().removesuffix(".yaml") for p in hits]


@cache
def file_asserts_numbers(path: Path) -> bool:
    """:func:`asserts_numbers` of a file."""
    return asserts_numbers(ast.parse(text_of(path)))


def asserts_numbers(tree: ast.AST) -> bool:
    """Whether a test file has an ``assert`` with a number in it, or compares tensors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and any(
            isinstance(n, ast.Constant) and type(n.value) in (int, float) for n in ast.walk(node.test)
        ):
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("assert_close", "allclose")):
            return True
    return False


def tests_of(cls: type, room: str) -> list[str]:
    """Numeric test files: the class's own, else the nearest that use it (or ``tests/helpers.py``)."""
    stem = cls.__module__.rsplit(".", 1)[-1]
    folder = REPO / "tests"
    helper = folder / "helpers.py"
    through_helper = mentions(cls.__name__, text_of(helper))
    ranked: dict[int, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("test_*.py")):
        text = text_of(path)
        used = mentions(cls.__name__, text) or (through_helper and "from helpers import" in text)
        if not used or "benchmarks" in path.parts or path.parent == folder:
            continue
        if file_asserts_numbers(path):
            distance = int(path.stem != f"test_{stem}") + 2 * int(path.parent.name != room)
            ranked[distance].append(path.relative_to(REPO).as_posix())
    return ranked[min(ranked)] if ranked else []


def measured_of(name: str, rows: list[dict[str, str]]) -> str:
    """``digits 50 %: avg .996 / .973 (3); ...`` from the runs, empty without any."""
    values: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        values[row["setting"], row["method"]].append((float(row["val/recall@1"]), float(row["val/map@r"])))
    parts = []
    for setting, title in SETTINGS.items():
        shown = []
        for method, label in MEASURED.get(name, {}).items():
            runs = values.get((setting, method))
            if runs:
                recall, precision = (statistics.fmean(column) for column in zip(*runs, strict=True))
                shown.append(f"{label} {recall:.3f} / {precision:.3f} ({len(runs)})")
        if shown:
            parts.append(f"{title}: {', '.join(shown)}")
    return "<br>".join(parts)


def pretrained_of(name: str, table: Path = SSL_CSV) -> str:
    """``digits: kNN .980 / linear .985 (3); ...`` from the self-supervised runs, empty without any."""
    values: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] == PRETRAINED.get(name):
                values[row["setting"]].append((float(row["knn_top1"]), float(row["probe_top1"])))
    parts = []
    for setting, runs in values.items():
        knn, linear = (statistics.fmean(column) for column in zip(*runs, strict=True))
        parts.append(f"{setting}: kNN {knn:.3f} / linear {linear:.3f} ({len(runs)})")
    return "<br>".join(parts)


def purpose_of(cls: type) -> str:
    """First sentence of the docstring as Markdown."""
    first = (inspect.getdoc(cls) or "").split("\n\n", 1)[0].replace("\n", " ").strip()
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", first).replace("``", "`").replace("|", "\\|")


def methods(table: Path = CSV) -> list[Method]:
    """All rows."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        Method(
            cls.__name__,
            room,
            purpose_of(cls),
            recipes_of(cls.__name__),
            tests_of(cls, room),
            measured_of(cls.__name__, rows) or pretrained_of(cls.__name__),
            PAPER.get(cls.__name__, ""),
        )
        for room in ROOMS
        for cls in public_classes(room)
    ]


def render(table: Path = CSV) -> str:
    """The text of METHODS.md."""
    lines = [HEAD]
    by_room: dict[str, list[Method]] = defaultdict(list)
    for method in methods(table):
        by_room[method.room].append(method)
    for room, found in by_room.items():
        lines += [
            f"## {room.capitalize()}\n",
            "| class | what it is | status | recipes | measured | paper | tests |",
            "|---|---|---|---|---|---|---|",
        ]
        for m in found:
            recipes = ", ".join(f"`{r}`" for r in m.recipes) or "–"
            tests = ", ".join(f"`{t}`" for t in m.tests) or "–"
            lines.append(
                f"| `{m.name}` | {m.purpose} | {m.status} | {recipes} | {m.measured or '–'} "
                f"| {m.paper or '–'} | {tests} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        current = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == render()
        print("METHODS.md is up to date" if current else "run: python docs/make_methods.py")
        return 0 if current else 1
    TARGET.write_text(render(), encoding="utf-8")
    print(f"Wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
