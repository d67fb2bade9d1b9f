"""Recipes, the static check and start-up: all without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_nrml
from lightning_nrml.cli import recipes
from lightning_nrml.cli.check import check_config, check_tree
from lightning_nrml.cli.errors import UserError
from lightning_nrml.cli.run_folder import default_run_folder
from lightning_nrml.cli.schema import find_class

REPO = Path(__file__).resolve().parents[2]
RECIPE = """\
# Purpose:  try it
#           twice
# Command:  nrml fit --config a/one
# Hardware: none
# Expected: R@1 0.5
model: {class_path: MetricLearning}
data: {class_path: DigitsDataModule}
"""


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A recipe folder of its own."""
    root = tmp_path / "recipes"
    for name in ("a/one", "a/two", "b/two", "_base/cpu"):
        path = root / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECIPE)
    monkeypatch.setattr(recipes, "recipe_folder", lambda: root)
    monkeypatch.chdir(tmp_path)
    return root


def test_ls_show_cp(shelf, capsys, tmp_path):
    assert recipes.main(["ls"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a/one  try it twice",
        "a/two  try it twice",
        "b/two  try it twice",
    ]
    assert recipes.main(["show", "a/one"]) == 0
    assert capsys.readouterr().out == RECIPE
    assert recipes.main(["cp", "one", "mine.yaml"]) == 0
    assert (tmp_path / "mine.yaml").read_text() == RECIPE
    assert recipes.main(["cp", "one", "mine.yaml"]) == 2
    assert "mine.yaml exists" in capsys.readouterr().err
    assert recipes.main(["cp", "one", "mine.yaml", "--force"]) == 0


def test_names(shelf):
    assert recipes.find_config("one") == shelf / "a" / "one.yaml"
    assert recipes.find_config("recipes/b/two.yaml") == Path("recipes/b/two.yaml")
    with pytest.raises(UserError, match="could be a/two or b/two"):
        recipes.find_config("two")
    with pytest.raises(UserError, match="did you mean 'a/one'"):
        recipes.find_config("a/onne")
    assert recipes.expand_configs(["fit", "-c", "one", "--config=b/two", "--x", "one"]) == [
        "fit", "-c", str(shelf / "a/one.yaml"), f"--config={shelf / 'b/two.yaml'}", "--x", "one",
    ]  # fmt: skip


def test_validate(shelf, capsys):
    assert recipes.main(["validate"]) == 0
    (shelf / "a" / "one.yaml").write_text(
        RECIPE.replace("# Expected: R@1 0.5\n", "").replace("MetricL", "MetrikL")
    )
    assert recipes.main(["validate", "a/one"]) == 2
    out = capsys.readouterr().out
    assert "there is no model 'MetrikLearning'; did you mean 'MetricLearning'?" in out
    assert "lacks '# expected: ...'" in out


def test_shipped_recipes_are_valid():
    files = sorted((REPO / "recipes").rglob("*.yaml"))
    assert files
    assert [p for f in files if "sweeps" not in f.parts for p in check_config(f)] == []


def test_check_follows_arguments_up_the_class_tree():
    """MetricLearning's **kwargs go to EmbeddingModule: its arguments count, others do not."""
    info = find_class("MetricLearning", "model")
    assert info is not None
    assert {"backbone", "optimizer", "embedding_dim", "compile_backbone"} <= set(info.params)
    assert not info.open
    assert [p.name for p in info.params["optimizer"]] == ["OptimizerConfig"]
    tree = {"model": {"class_path": "MetricLearning", "init_args": {"optimizer": {"lr": 1, "momentm": 0}}}}
    assert list(check_tree(tree)) == [
        "model.init_args.optimizer.momentm: OptimizerConfig has no argument 'momentm'; "
        "did you mean 'momentum'?"
    ]


def test_check_reads_dotted_keys(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model.class_path: MetricLearning\nmodel.init_args.head: mlp\ntrainer.max_epoch: 1\n")
    assert check_config(path) == [
        f"{path}: trainer.max_epoch: Trainer has no argument 'max_epoch'; did you mean 'max_epochs'?"
    ]


def test_default_run_folder():
    assert default_run_folder(["a/base.yaml", "recipes/dml/prism.yaml"], "M", "D") == Path("runs/prism")
    assert default_run_folder(["runs/x/config.yaml"], "M", "D") == Path("runs/x")
    assert default_run_folder([], "pkg.MetricLearning", "pkg.Digits") == Path("runs/metriclearning_digits")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quick_commands_import_no_torch():
    code = """
import sys
import lightning_nrml
from lightning_nrml.__main__ import main
for args in ("", "--version", "recipes ls", "recipes show quickstart", "recipes validate"):
    main(args.split())
heavy = {"torch", "lightning", "numpy", "pandas", "rich", "jsonargparse"} & set(sys.modules)
assert not heavy, heavy
"""
    out = run(code)
    assert f"nrml {lightning_nrml.__version__}" in out
    assert "quickstart" in out


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "lightning_nrml", "--version"],
        capture_output=True,
        text=True,
        cwd=REPO,
        check=True,
    )
    assert done.stdout == f"nrml {lightning_nrml.__version__}\n"


def test_public_names():
    """Every exported name resolves, and the type checker's imports are the same list."""
    for name in lightning_nrml.__all__:
        assert getattr(lightning_nrml, name) is not None
    source = Path(lightning_nrml.__file__).read_text()
    for name in set(lightning_nrml.__all__) - {"__version__"}:
        assert source.count(name) >= 3, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_nrml.nothing
    from lightning_nrml.filters.chain import select

    assert lightning_nrml.select is select
