"""The documents: snippets run, commands parse, links lead somewhere, METHODS.md is complete and current."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_nrml.callbacks.ledger_file import write_ledger
from lightning_nrml.callbacks.summary import ROWS
from lightning_nrml.cli.app import run
from lightning_nrml.cli.check import (
    COMMANDS,
    OWN_SECTIONS,
    check_config,
    check_override,
    load_yaml,
    top_level_keys,
)
from lightning_nrml.cli.recipes import config_arguments, find_config
from lightning_nrml.data import DigitsDataModule, NoiseConfig
from lightning_nrml.memory import SampleLedger

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "docs"))
import make_figures  # noqa: E402
import make_methods  # noqa: E402

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- (?P<mark>[^\n]*?) -->\n```(?P<language>\w+)\n(?P<code>.*?)\n```", re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
README = (REPO / "README.md").read_text(encoding="utf-8")


def blocks(page: Path, mark: str, language: str) -> list[str]:
    """Code of the fenced blocks of a page that carry a mark."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [m["code"] for m in found if m["mark"] == mark and m["language"] == language]


def name(page: Path) -> str:
    """Path below the repository, for test ids."""
    return page.relative_to(REPO).as_posix()


PYTHON_PAGES = [p for p in PAGES if blocks(p, "test", "python")]
CONFIGS = [(p, i) for p in PAGES for i, _ in enumerate(blocks(p, "test: config", "yaml"))]


def test_the_pages_have_snippets() -> None:
    assert {"README.md", "docs/own_module.md", "docs/data.md", "docs/quickstart.md"} <= set(
        map(name, PYTHON_PAGES)
    )
    assert len(CONFIGS) >= 8


def test_no_python_or_yaml_snippet_is_left_out() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = sum(language in ("python", "yaml") for language, _ in FENCE.findall(text))
        marked = sum(m["language"] in ("python", "yaml") for m in BLOCK.finditer(text))
        assert fenced == marked, f"{name(page)} has a python or yaml snippet without a <!-- test --> mark"


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name)
def test_python_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The snippets of a page, top to bottom, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    data = DigitsDataModule(noise=NoiseConfig("symmetric", 0.5))
    write_ledger(SampleLedger(data.num_train_samples), data, tmp_path / "runs" / "quickstart")
    space: dict[str, object] = {"__name__": "__main__"}
    for i, code in enumerate(blocks(page, "test", "python")):
        exec(compile(code, f"{name(page)}, snippet {i + 1}", "exec"), space)
    for precision in re.findall(r"keep precision ([\d.]+)", capsys.readouterr().out):
        assert float(precision) > 0.65, "the filter of the example does not filter"


@pytest.mark.parametrize(
    ("page", "number"), CONFIGS, ids=lambda v: name(v) if isinstance(v, Path) else str(v)
)
def test_config_snippets_are_accepted(
    page: Path,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the light check, and by the command line on top of the quickstart; nothing is run."""
    code = blocks(page, "test: config", "yaml")[number]
    file = tmp_path / "my.yaml"
    file.write_text(code, encoding="utf-8")
    assert check_config(file) == []
    base = tmp_path / "base.yaml"
    tree = load_yaml(REPO / "recipes" / "quickstart.yaml")
    # whole sections are replaced, as in a file of the reader's own
    base.write_text(yaml.safe_dump({**tree, **yaml.safe_load(code)}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(["fit", f"--config={base}", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(code)
    if "data" in given:
        assert printed["data"]["class_path"].endswith(given["data"]["class_path"])
    if "callbacks" in given.get("trainer", {}):
        assert len(printed["trainer"]["callbacks"]) == len(given["trainer"]["callbacks"])


#: of single verbs, such as ``--ckpt_path`` and ``--out``
VERB_ARGUMENTS = top_level_keys() - {"trainer", "model", "data", *OWN_SECTIONS}


def commands() -> list[tuple[str, list[str]]]:
    """``(page, arguments)`` of every ``nrml`` command in a bash block."""
    found = []
    for page in PAGES:
        for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
                words = shlex.split(line.split("&&")[-1], comments=True)
                if words[:3] == ["python", "-m", "lightning_nrml"]:
                    found.append((name(page), words[3:]))
                elif words[:1] == ["nrml"]:
                    found.append((name(page), words[1:]))
    return found


@pytest.mark.parametrize(
    ("page", "args"), commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v)[:60]
)
def test_commands_name_real_recipes_and_keys(page: str, args: list[str]) -> None:
    if args[0] == "recipes":
        assert args[1] in ("ls", "show", "cp", "validate")
        assert not args[2:] or find_config(args[2]).is_file()
        return
    assert args[0] in (*COMMANDS, "inject")
    if "--ledger" in args:
        return
    tree = load_yaml(REPO / "recipes" / "quickstart.yaml")
    for _, value in config_arguments(args):
        if not value.startswith("runs/"):
            tree = load_yaml(find_config(str(REPO / value) if value.endswith(".yaml") else value))
    rest = iter(args[1:])
    for word in rest:
        assert word.startswith("--"), f"{page}: {word}"
        key, glued, value = word[2:].partition("=")
        if not glued and key != "print_config":
            value = next(rest)
        assert key in ("config", "print_config", *VERB_ARGUMENTS) or check_override(key, value, tree) is None


def test_readme_has_the_two_commands() -> None:
    assert "\npip install . && python -m lightning_nrml fit --config recipes/quickstart.yaml\n" in README
    assert '\npip install -e ".[test]" && pytest -n 2\n' in README


def printed_result(text: str) -> dict[str, float]:
    """Logged key -> last-epoch value, from the table that ``fit`` prints (cells may be wrapped)."""
    found, number = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("│ \n").split("│")]
        if line.startswith("│") and len(cells) >= 2 and re.fullmatch(r"[\d.]+", cells[1]):
            number = float(cells[1])
        key = re.search(r"\((\w+/[\w@.]+)\)", line)
        if key and number is not None:
            found[key[1]] = number
    return found


def test_readme_output_has_the_rows_that_the_program_prints() -> None:
    shown = re.search(r"<!-- quickstart output -->\n```text\n(.*?)```", README, re.DOTALL)[1]  # type: ignore[index]
    result = printed_result(shown)
    of_other_tasks = {"val/top1", "val/knn_top1", "val/probe_top1"}
    assert set(result) == set(ROWS) - of_other_tasks
    assert 0.9 < result["val/map@r"] < result["val/recall@1"] <= 1
    for label in (
        "method",
        "backbone",
        "data",
        "noise",
        "batch",
        "steps",
        "filters",
        "device",
        "outputs",
        "resume",
    ):
        assert f"│ {label} " in shown


@pytest.mark.slow
def test_readme_output_is_what_the_quickstart_gives(tmp_path: Path) -> None:
    args = ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    assert run(["fit", "--config", str(REPO / "recipes" / "quickstart.yaml"), *args]) == 0
    last = json.loads((tmp_path / "results.json").read_text())["last"]
    for key, value in printed_result(README).items():
        if key.startswith(("val/", "noise/")):
            assert last[key] == pytest.approx(value, abs=0.03), key  # other CPUs round differently


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        where, _, anchor = target.partition("#")
        file = page.parent / where if where else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in headings(file), f"{name(page)} links to {target}"


def headings(page: Path) -> set[str]:
    """Anchors of a page as GitHub and the site make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    kept = (re.sub(r"[^\w\- ]", "", h).strip().lower() for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {heading.replace(" ", "-") for heading in kept}


def test_site_navigation_names_every_page() -> None:
    text = (REPO / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE))
    there = {p.relative_to(REPO / "docs").as_posix() for p in (REPO / "docs").rglob("*.md")}
    assert listed == there
    for page in (REPO / "docs" / "api").glob("*.md"):
        for module in re.findall(
            r"^::: lightning_nrml\.(\S+)", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            path = REPO / "lightning_nrml" / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.is_dir(), f"{page.name}: {module}"


def test_benchmark_page_has_each_marker_once() -> None:
    text = (REPO / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for part in ("noise tables", "ssl tables", "speed tables"):
        start, end = text.index(f"<!-- {part} -->"), text.index(f"<!-- end {part} -->")
        assert text.count(f"<!-- {part} -->") == text.count(f"<!-- end {part} -->") == 1
        assert start < end


# ---- METHODS.md -----------------------------------------------------------------------------------


def test_methods_page_is_up_to_date() -> None:
    written = (REPO / "METHODS.md").read_text(encoding="utf-8")
    assert written == make_methods.render(), "run: python docs/make_methods.py"


METHODS = [m for m in make_methods.methods() if m.room in ("modules", "filters")]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_module_and_filter_has_recipe_docs_and_numeric_test(method: make_methods.Method) -> None:
    assert method.recipes, f"no recipe names {method.name}"
    assert method.tests, f"no test of {method.name} asserts a number"
    docs = [p for p in PAGES if p.parent.name == "docs"]
    assert any(make_methods.mentions(method.name, p.read_text(encoding="utf-8")) for p in docs)
    assert method.purpose.endswith(".")


def test_a_file_without_numbers_is_not_taken_for_a_numeric_test() -> None:
    import ast

    assert not make_methods.asserts_numbers(
        ast.parse("def test_a():\n    assert name == 'x'\n    assert ok\n")
    )
    assert make_methods.asserts_numbers(ast.parse("def test_a():\n    assert abs(x) < 1e-6\n"))
    assert make_methods.asserts_numbers(ast.parse("torch.testing.assert_close(a, b)"))


def test_figure_is_drawn_from_the_runs(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    rows = ["setting,method,seed,val/recall@1,val/map@r"]
    rows += [f"digits_50,{m},{s},0.{9 - s},0.5" for m in ("none", "prism_avg") for s in range(3)]
    table.write_text("\n".join(rows))
    values = make_figures.read(table)
    assert values["digits_50", "none", "val/recall@1"] == [0.9, 0.8, 0.7]
    make_figures.draw(values, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="none of the settings"):
        make_figures.draw({}, tmp_path / "empty.png")


# ---- CONTRIBUTING.md ------------------------------------------------------------------------------


def test_the_filter_of_contributing_works_as_written(tmp_path: Path) -> None:
    """Its pieces in a copy of the package: the test passes, the recipe is valid and trains a step."""
    for folder in ("lightning_nrml", "recipes"):
        shutil.copytree(REPO / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = []
    for block in BLOCK.finditer((REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        kind, _, path = block["mark"].partition(": ")
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind == "append":
            text = target.read_text(encoding="utf-8") + block["code"] + '\n__all__ += ["BatchAgreement"]\n'
            target.write_text(text, encoding="utf-8")
        else:
            target.write_text(block["code"] + "\n", encoding="utf-8")
        files.append(path)
    assert len(files) == 4

    recipe = "recipes/dml/batch_agreement_digits.yaml"
    step = ["fit", "--config", recipe, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    test = ["-q", "-p", "no:cacheprovider", "tests/filters/test_batch_agreement.py"]
    code = (  # one process, as importing torch is most of each
        "import sys, pytest; from lightning_nrml.__main__ import main; "
        f"sys.exit(pytest.main({test}) or main(['recipes', 'validate', '{recipe}']) or main({step}))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    output = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, output
    assert f"{recipe}: ok" in done.stdout, output
