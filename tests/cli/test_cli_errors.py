"""User errors: one sentence with the key and the nearest match, exit code 2, no traceback."""

from __future__ import annotations

import sys

import pytest
from jsonargparse import ArgumentError

from lightning_nrml.__main__ import main
from lightning_nrml.cli.errors import nearest
from lightning_nrml.cli.explain import explain

EDITS = {
    "model key": (
        "embedding_dim",
        "embeding_dim",
        "tiny.yaml: model.init_args.embeding_dim: TinyModule has no argument 'embeding_dim'; "
        "did you mean 'embedding_dim'?",
    ),
    "nested key": ("{lr:", "{lrr:", "rule.lrr: Rule has no argument 'lrr'; did you mean 'lr'?"),
    "trainer key": ("max_epochs", "max_epoch", "trainer.max_epoch: Trainer has no argument 'max_epoch'; did"),
    "section": ("trainer:", "trainr:", "'trainr' is no config section; did you mean 'trainer'?"),
    "own class": ("cli_fakes.TinyModule", "MetricLearnin", "'MetricLearnin'; did you mean 'MetricLearning'?"),
    "user's class": (
        "fakes.TinyData",
        "fakes.TinyDat",
        "data: module 'cli_fakes' has no class 'TinyDat'; it has Broken, ",
    ),
    "wrong type": ("dim: 4", "dim: four", "model.embedding_dim (TinyModule) must be int, got 'four'."),
    "logger key": ("flush_logs_every", "flush_log_every", "did you mean 'flush_logs_every_n_steps'?"),
    "init_args": ("init_args: {batch", "init_arg: {batch", "data.init_arg: beside class_path only init_args"),
    "yaml": ("{batch_size: 8}", "{batch_size: 8", "this is not valid YAML"),
}


@pytest.mark.parametrize("name", EDITS)
def test_typo_in_yaml(nrml, folder, name):
    old, new, expected = EDITS[name]
    text = (folder / "tiny.yaml").read_text()
    assert old in text
    (folder / "tiny.yaml").write_text(text.replace(old, new))
    code, _, err = nrml("fit", "--config", "tiny.yaml")
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


OPTIONS = {
    "--model.embeding_dim=3": "TinyModule has no argument 'embeding_dim'; did you mean 'embedding_dim'?",
    "--model.init_args.rule.lrr=3": "Rule has no argument 'lrr'; did you mean 'lr'?",
    "--trainer.max_epoch=3": "Trainer has no argument 'max_epoch'; did you mean 'max_epochs'?",
    "--trainer.max_epochs=three": "trainer.max_epochs must be int, got 'three'.",
    "--trainer.precision=31": "trainer.precision cannot be '31'; accepted: 16, 16-mixed,",
    "--modl.embedding_dim=3": "'modl' is no config section; did you mean 'model'?",
    "--trainer.callbacks+=PRISN": "there is no callback 'PRISN'; did you mean 'PRISM'?",
    "--checkpoint_best.mode=most": "checkpoint_best.mode cannot be 'most'; accepted: max, min.",
    "--model.rule={lr: 1, kwarg: 2}": "--model.rule.kwarg: Rule has no argument 'kwarg'; accepted: lr.",
    "--model.class_path=cli_fakes.TinyModul": "did you mean 'TinyModule'?",
    "--trainer.callbacks=[{class_path: PRISM, init_args: {filter: {class_path: cli_fakes.N}}}]": (
        "--trainer.callbacks.0.init_args.filter: module 'cli_fakes' has no class 'N'; accepted: Broken, "
    ),
    "--trainer.callbacks+=cli_fakes.Nope": "module 'cli_fakes' has no class 'Nope'",
    "--config=quickstrat": "No config file or recipe is called 'quickstrat': did you mean 'quickstart'?",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_typo_in_option(nrml, option):
    code, _, err = nrml("fit", "--config", "tiny.yaml", option)
    assert code == 2
    assert OPTIONS[option] in err
    assert len(err.strip().splitlines()) == 1


def test_option_of_the_last_callback(nrml):
    """Named with its class; what only the parser can tell is told without its internals."""
    callbacks = ("--trainer.callbacks+=PRISM", "--trainer.callbacks+=cli_fakes.TinyCallback")
    fit = ("fit", "--config", "tiny.yaml", *callbacks)
    code, _, err = nrml(*fit, "--trainer.callbacks.filter.class_path=PRISM")
    assert code == 2
    assert "callbacks.filter.class_path: TinyCallback has no argument 'filter'; accepted: rate." in err
    code, _, err = nrml(*fit, "--trainer.callbacks.rate=[fast]")
    assert code == 2
    assert "there is no argument 'rate', or it takes another type" in err
    parsers = ArgumentError(
        None,
        'Parser key "trainer.callbacks":\n  Not a valid subclass of Callback. '
        "Got value: NestedArg(key='filter.class_path', val='some.Filter')",
    )
    text = explain(parsers, ["fit"])
    assert text.startswith(
        "trainer.callbacks.filter.class_path cannot be set to 'some.Filter'; within a list"
    )


def test_unknown_option_of_the_optimiser(nrml):
    """Says where the optimiser's own options go."""
    optimizer = "--model.optimizer={name: adamw, bettas: [0.9, 0.99]}"
    code, _, err = nrml("fit", "--config", "tiny.yaml", "--model=MetricLearning", optimizer)
    assert code == 2
    assert "no argument 'bettas' (options that it passes on go under 'kwargs'); accepted: decay_all" in err


def test_a_callback_that_is_there_twice_is_named(nrml):
    """As when one is added that the recipe has already."""
    twice = "--trainer.callbacks=[RetrievalEvaluator, RetrievalEvaluator]"
    code, _, err = nrml("fit", "--config", "tiny.yaml", twice)
    assert code == 2
    assert err.startswith("nrml: trainer: Found more than one stateful callback of type `RetrievalEvaluator`")


def test_audit_tells_what_it_needs(nrml, folder):
    """Of the module; and which audit takes ``--images``."""
    code, _, err = nrml("audit", "--config", "tiny.yaml", "--ckpt_path", "init")
    assert code == 2
    assert "TinyModule has no predict_step" in err
    code, _, to_predict = nrml("predict", "--config", "tiny.yaml", "--ckpt_path", "init")
    assert code == 2
    assert to_predict.strip() == err.partition(";")[0] + "."
    assert "{'embedding': (B, D), 'index': batch['index']}" in err
    assert err.strip().endswith("nrml audit --ledger runs/tiny")
    code, _, err = nrml("audit", "--config", "tiny.yaml", "--ckpt_path", "init", "--images", "here")
    assert code == 2
    assert "--images belongs to --ledger" in err


def test_error_of_our_own_constructor(nrml):
    """jsonargparse wraps it in ten lines about unions; the user sees the sentence."""
    code, _, err = nrml("fit", "--config", "tiny.yaml", "--data=DigitsDataModule", "--data.noise.rate=1.5")
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("nrml: noise.rate must lie in [0, 1]")
    assert "Union" not in err


def test_bug_keeps_its_traceback(nrml):
    with pytest.raises(ValueError, match="not a number"):
        nrml("fit", "--config", "tiny.yaml", "--data=cli_fakes.Broken")


def test_debug_shows_user_errors_in_full(folder, monkeypatch):
    monkeypatch.setenv("NRML_DEBUG", "1")
    with pytest.raises(Exception, match="finds nothing"):
        main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last"])


def test_unknown_command(nrml):
    code, _, err = nrml("fitt", "--config", "tiny.yaml")
    assert code == 2
    assert "there is no command 'fitt'; did you mean 'fit'?" in err


def test_missing_sections(nrml):
    code, _, err = nrml("fit")
    assert code == 2
    assert "'fit' still needs data and model" in err


def test_nearest():
    assert nearest("embeding", ["embedding", "loss"]) == "did you mean 'embedding'?"
    assert nearest("prism", ["PRISM", "BARE"]) == "did you mean 'PRISM'?"
    assert nearest("zzz", list("dcba"), limit=3) == "accepted: a, b, c, ...."
    assert nearest("x", []) == "nothing is accepted here."


@pytest.mark.parametrize("several", [False, True])
def test_a_logger_whose_package_is_missing(nrml, folder, monkeypatch, several):
    """Lightning tells it within what the parser tried."""
    for module in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    for flag in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{flag}", False)
    logger = "{class_path: TensorBoardLogger, init_args: {save_dir: logs}}"
    code, _, err = nrml(
        "fit", "--config=tiny.yaml", f"--trainer.logger={f'[{logger}]' if several else logger}"
    )
    assert code == 2
    assert err.startswith("nrml: TensorBoardLogger cannot be used: Neither `tensorboard` nor `tensorboardX`")
    assert "pip install" in err
    assert len(err.strip().splitlines()) == 1
