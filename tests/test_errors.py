"""User mistakes and bad data: one sentence that names culprit and remedy, or a run that survives."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import digits, module, trainer
from PIL import Image

from lightning_nrml.__main__ import main
from lightning_nrml.callbacks import NoiseFilterCallback, RetrievalEvaluator
from lightning_nrml.callbacks.predictions import write_predictions
from lightning_nrml.cli.check import check_tree
from lightning_nrml.cli.errors import UserError
from lightning_nrml.cli.explain import explain, user_error
from lightning_nrml.cli.foreign import foreign_sentence
from lightning_nrml.cli.run_folder import check_writable, resolve_checkpoint
from lightning_nrml.data import ArrayDataModule, DigitsDataModule, FolderDataModule, TableDataModule
from lightning_nrml.data.sources import BadImageError
from lightning_nrml.filters import FixedFilter
from lightning_nrml.memory import FeatureQueue
from lightning_nrml.optim import ScheduleConfig

# ---- bad data: what a datamodule says --------------------------------------------------------------


def images(root: Path, split: str, classes: str, number: int = 4) -> None:
    """PNG files of 8 x 8 noise in ``root/split/class``."""
    rng = np.random.default_rng(0)
    for name in classes:
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def array_file(path: Path, **changes: Any) -> Path:
    """An npz of 12 images in 3 classes, the last 4 for testing."""
    content: dict[str, Any] = {
        "image": np.zeros((12, 8, 8), np.uint8),
        "label": np.arange(12) % 3,
        "train_class": np.arange(12) < 8,
    }
    np.savez(path, **{k: v for k, v in {**content, **changes}.items() if v is not None})
    return path


def sentence(make: Any) -> str:
    """What the command line would print for the error that ``make()`` raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the sentence is what is checked
        make()
    told = user_error(caught.value)
    assert told is not None, f"{caught.value!r} would show a traceback"
    text = explain(told, ["fit"])
    assert "\n" not in text
    return text


def folder_data(root: Path, **kwargs: Any) -> FolderDataModule:
    return FolderDataModule(str(root), image_size=8, batch_size=4, **kwargs)


def test_missing_image_is_named_or_skipped_and_listed(tmp_path, monkeypatch):
    images(tmp_path, "train", "ab")
    rows = [f"train/{c}/{i}.png,{c}" for c in "ab" for i in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows, "train/a/gone.png,a"]))
    options = {"image_size": 8, "batch_size": 4}
    text = sentence(lambda: TableDataModule(str(tmp_path / "t.csv"), **options).splits)
    assert "1 of 9 train images are missing" in text
    assert "gone.png" in text
    assert "on_bad_image: skip" in text
    monkeypatch.chdir(tmp_path)
    data = TableDataModule("t.csv", on_bad_image="skip", **options)
    with pytest.warns(UserWarning, match="left out 1 missing train images"):
        data.setup("fit")
    assert data.num_train_samples == 8
    assert "gone.png" in (tmp_path / "bad_images.tsv").read_text()


@pytest.mark.parametrize("cache", [True, False])
def test_corrupt_image_is_named_or_replaced_and_listed(tmp_path, monkeypatch, cache):
    for split in ("train", "test"):
        images(tmp_path, split, "ab")
    victim = tmp_path / "train" / "b" / "2.png"
    victim.write_bytes(victim.read_bytes()[:50])

    def epoch(**kwargs: Any) -> torch.Tensor:
        data = folder_data(tmp_path, cache=cache, **kwargs)
        data.setup("fit")
        return torch.cat([batch["index"] for batch in data.train_dataloader()])

    text = sentence(epoch)
    assert "train/b/2.png" in text
    assert "on_bad_image: skip" in text
    monkeypatch.chdir(tmp_path)
    seen = epoch(on_bad_image="skip")
    assert len(seen) == 8  # replaced, so batches keep their size
    assert 6 not in seen
    assert "train/b/2.png" in (tmp_path / "bad_images.tsv").read_text()


def test_error_of_a_loader_process_keeps_its_sentence():
    """Torch sends it home as a traceback in text."""
    error = BadImageError(
        "Caught BadImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n'
        "lightning_nrml.data.sources.BadImageError: cannot read b/2.png (truncated); mend or remove it"
    )
    told = user_error(error)
    assert told is not None
    assert explain(told, ["fit"]) == "cannot read b/2.png (truncated); mend or remove it"


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "nan label": ({"label": np.where(np.arange(12) == 5, np.nan, 0)}, "label nan at row 5"),
    "negative label": ({"label": np.where(np.arange(12) == 5, -1, 0)}, "label -1 at row 5"),
    "label out of range": ({"class_names": np.array(["a", "b"])}, "label 2 at row 2 is not accepted"),
    "label of text": ({"label": np.array(list("abc") * 4)}, "labels must be integers"),
    "no label": ({"label": None}, "has no array 'label'; it has image, train_class"),
    "no split": ({"train_class": None}, "has no array 'train_class'"),
    "empty test": ({"train_class": np.ones(12, bool)}, "the test split is empty"),
    "empty train": ({"train_class": np.zeros(12, bool)}, "the train split is empty"),
    "too few labels": ({"label": np.arange(11) % 3}, "must have shape (11,), got (12,)"),
    "classes partly seen": (
        {"label": np.array([0] * 8 + [0, 0, 1, 1])},
        "1 of 2 test classes do not occur in train",
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_array(tmp_path, name):
    changes, expected = BAD_ARRAYS[name]
    path = array_file(tmp_path / "a.npz", **changes)
    text = sentence(lambda: ArrayDataModule(str(path)).splits)
    assert expected in text
    assert "a.npz" in text


def test_other_kinds_of_file(tmp_path):
    """NumPy itself would advise to load it as a pickle."""
    (tmp_path / "a.npz").write_text("hello")
    text = sentence(lambda: ArrayDataModule(str(tmp_path / "a.npz")).splits)
    assert "is no readable npz" in text
    assert "pickle" not in text


def test_folders_with_unequal_classes_or_no_images(tmp_path):
    images(tmp_path, "train", "abc")
    images(tmp_path, "test", "abx")
    assert "1 of 3 test classes do not occur in train (x)" in sentence(lambda: folder_data(tmp_path).splits)
    for file in (tmp_path / "test").rglob("*.png"):
        file.unlink()
    assert "test has no class folders with images" in sentence(lambda: folder_data(tmp_path).splits)


TABLES = {
    "no label column": ("path,lbl\na.png,0", "has no column 'label'; its columns are path, lbl"),
    "empty label": ("path,label\na.png,\n", "column 'label', row 0: empty"),
    "wrong split": ("path,label,split\na.png,0,trian", "'trian'; a split is one of train, val, test"),
    "no rows": ("path,label", "the train split is empty"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_table(tmp_path, name):
    text, expected = TABLES[name]
    (tmp_path / "t.csv").write_text(text)
    assert expected in sentence(lambda: TableDataModule(str(tmp_path / "t.csv")).splits)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "not divisible": (
        {"batch_size": 64, "m_per_class": 7},
        "multiple of m_per_class 7: set batch_size to 63",
    ),
    "m of 0": ({"m_per_class": 0}, "m_per_class must be at least 1"),
    "batch of 0": ({"batch_size": 0}, "batch_size must be at least 1"),
    "workers": ({"num_workers": -1}, "num_workers must be 0 (load in this process) or more, got -1"),
    "skip": ({"on_bad_image": "skpi"}, "on_bad_image must be 'raise' or 'skip', got 'skpi'"),
    "no such table": ({"noise": "nowhere.csv"}, "label table 'nowhere.csv' does not exist"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_data_arguments(name):
    kwargs, expected = ARGUMENTS[name]
    assert expected in sentence(lambda: DigitsDataModule(**kwargs).splits)


@pytest.mark.parametrize("kwargs", [{"batch_size": 4096}, {"batch_size": 64, "m_per_class": 4}])
def test_batch_larger_than_the_data(kwargs):
    assert "lower batch_size" in sentence(lambda: DigitsDataModule(**kwargs).train_dataloader())


# ---- runs that survive, or stop for a reason --------------------------------------------------------


def test_class_of_one_sample_trains(tmp_path):
    label = np.array([0] * 15 + [1] * 16 + [2])
    path = array_file(
        tmp_path / "a.npz", image=np.zeros((32, 8, 8), np.uint8), label=label, train_class=None,
        split=np.repeat(["train"], 32),
    )  # fmt: skip
    data = ArrayDataModule(str(path), split_key="split", batch_size=8, m_per_class=4)
    with pytest.warns(UserWarning, match="1 of 3 train classes have one sample only"):
        data.setup("fit")
    net = module(schedule=ScheduleConfig("constant", 0))
    trainer(tmp_path, 1).fit(net, data)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_memory_smaller_than_a_batch(tmp_path):
    """It holds the newest rows of the batch; training goes on."""
    queue = FeatureQueue(3, 2)
    queue.enqueue(torch.arange(10.0).reshape(5, 2), torch.arange(5))
    assert sorted(queue.get()[1].tolist()) == [2, 3, 4]
    net = module(memory_size=10)  # batches have 32 rows
    trainer(tmp_path, 1, limit_val_batches=0).fit(net, digits())
    assert len(net.memory) == 10
    assert torch.isfinite(net.memory.embedding).all()


def test_nan_loss_names_the_samples(tmp_path):
    net = module()
    net.backbone.body[0].register_forward_pre_hook(_poison)
    with pytest.raises(FloatingPointError, match="dataset indices") as caught:
        trainer(tmp_path, 1, limit_val_batches=0).fit(net, digits())
    assert user_error(caught.value) is not None


def _poison(layer: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    x = args[0].clone()
    x[0] = torch.nan
    return (x,)


def test_batches_in_which_everything_is_dropped(tmp_path):
    """The loss is 0 and attached to the graph: nothing moves, nothing fails."""
    data = digits()
    net = module(memory_size=0)
    before = {k: v.clone() for k, v in net.head.state_dict().items()}
    callback = NoiseFilterCallback(FixedFilter(torch.zeros(data.num_train_samples, dtype=torch.bool)))
    fit = trainer(tmp_path, 1, [callback], limit_val_batches=0)
    net.optimizer_config.weight_decay = 0.0
    fit.fit(net, data)
    assert fit.callback_metrics["train/loss"] == 0
    assert fit.callback_metrics["train/keep_rate"] == 0
    assert all(torch.equal(before[k], v) for k, v in net.head.state_dict().items())


# ---- checkpoints and folders ------------------------------------------------------------------------


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--ckpt_path last finds nothing: .*leave out --ckpt_path"):
        resolve_checkpoint("fit", "last", tmp_path)
    with pytest.raises(UserError, match="'test' needs --ckpt_path"):
        resolve_checkpoint("test", None, tmp_path)


def test_run_folder_in_the_way(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(
        UserError, match=r"runs is a file; name another place with --trainer.default_root_dir"
    ):
        check_writable(tmp_path / "runs" / "x")
    check_writable(tmp_path / "new" / "x")
    assert not (tmp_path / "new").exists()


def test_machine_conditions_are_told_in_a_sentence():
    assert foreign_sentence(PermissionError(13, "Permission denied", "/x/last.ckpt")) == (
        "/x/last.ckpt: Permission denied. The run folder is set by --trainer.default_root_dir; name one that "
        "can be written."
    )
    assert foreign_sentence(FileNotFoundError(2, "No such file", "x")) is None  # may be a bug
    assert foreign_sentence(ValueError("x")) is None


def test_weights_of_another_net():
    """The first wrong shapes, those of the net before those of a filter's memory."""
    net, other = torch.nn.Module(), torch.nn.Module()
    for part, size in ((net, 4), (other, 3)):
        part.filters = torch.nn.ModuleDict({"prism": torch.nn.Linear(size, 1)})
        part.head = torch.nn.Linear(size, 1)
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict({**other.state_dict(), "extra": torch.zeros(1)})
    told = foreign_sentence(caught.value)
    assert told is not None
    assert told.startswith(
        "The checkpoint does not fit the model: head.weight is (1, 3) there and (1, 4) here;"
    )
    assert "it has the unknown extra" in told
    assert "config.yaml" in told


# ---- keys, classes and values, through the command line ---------------------------------------------


def test_wrong_key_and_class_with_the_nearest():
    tree = {
        "model": {"class_path": "MetricLearning", "init_args": {"optimiser": {}, "loss": "ContrastivLoss"}},
        "trainer": {"logger": "WandbLoger", "callbacks": {"class_path": "PRISN"}},
        "data": {"class_path": "DigitsDataModule", "init_args": [1]},
    }
    told = "\n".join(check_tree(tree))
    for words in (
        "has no argument 'optimiser'; did you mean 'optimizer'?",
        "there is no loss 'ContrastivLoss'; did you mean 'ContrastiveLoss'?",
        "there is no logger 'WandbLoger'; did you mean 'WandbLogger'?",
        "there is no callback 'PRISN'; did you mean 'PRISM'?",
        "data.init_args: must be a mapping of arguments, got '[1]'",
    ):
        assert words in told


CONFIG: dict[str, Any] = {
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    "model": {
        "class_path": "MetricLearning",
        "init_args": {
            "backbone": "conv4",
            "backbone_kwargs": {"input_size": 8, "widths": [8], "strides": [2]},
            "embedding_dim": 4,
            "schedule": {"name": "constant", "warmup_steps": 0},
        },
    },
    "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 512}},
}

#: what was meant -> (place in the config, wrong value, what must be said)
MISTAKES: dict[str, tuple[str, Any, str]] = {
    "optimiser": ("model.optimizer", {"name": "adamm"}, "'adamm' is not an optimiser of timm; nearest: adam"),
    "its kwargs": ("model.optimizer", {"kwargs": {"foo": 1}}, "optimizer.kwargs {'foo': 1} do not fit"),
    "backbone": ("model.backbone", "resnet81", "'resnet81' is not a timm model. Nearest: resnet18"),
    "backbone kwargs": ("model.backbone_kwargs", {"sz": 8}, "backbone_kwargs {'sz': 8} do not fit"),
    "input size": ("model.backbone_kwargs", {"input_size": 28}, "conv4 was built for 28 x 28 images"),
    "start weights": ("model.init_weights", "no.npz", "init_weights: there is no file 'no.npz'"),
    "loss": ("model.loss", {"class_path": "PMLLoss", "init_args": {"name": "TripletLos"}}, "has no loss"),
    "no loss name": ("model.loss", {"class_path": "PMLLoss"}, "model.loss (PMLLoss) needs name"),
    "noise": ("data.noise", 0.5, "data.noise (DigitsDataModule) must be NoiseConfig or str, got '0.5'"),
    "noise kind": ("data.noise", {"kind": "symetric"}, "did you mean 'symmetric'?"),
    "no root": ("data", {"class_path": "FolderDataModule"}, "data (FolderDataModule) needs root"),
    "accelerator": ("trainer.accelerator", "cuda0", "trainer: You selected an invalid accelerator name"),
    "devices": ("trainer.devices", "two", "trainer: `devices` selected with `CPUAccelerator`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_config(tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    place, value, expected = MISTAKES[name]
    config = copy.deepcopy(CONFIG)
    section, _, key = place.partition(".")
    if not key:
        config[section] = value
    elif section == "trainer":
        config[section][key] = value
    else:
        config[section]["init_args"][key] = value
    Path("c.yaml").write_text(yaml.safe_dump(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["fit", "--config", "c.yaml"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("nrml: ")]
    assert len(lines) == 1
    assert expected in lines[0]


# ---- one run, resumed wrongly and predicted with ----------------------------------------------------


def test_wrong_resumes_and_predictions(tmp_path, monkeypatch, capfd):
    """Other sizes, another optimiser, a torn file; then embeddings of the test split on disk."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))

    def call(*args: str) -> tuple[int, str]:
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main([args[0], "--config", "c.yaml", *args[1:]])
        return code, capfd.readouterr().err

    assert call("fit")[0] == 0
    whole = Path("runs/c/checkpoints/last.ckpt")
    code, err = call("fit", "--ckpt_path=last", "--trainer.max_epochs=2", "--model.embedding_dim=5")
    assert code == 2
    assert "does not fit the model: head.weight is (4, 128) there and (5, 128) here" in err
    code, err = call("fit", "--ckpt_path=last", "--trainer.max_epochs=2", "--model.optimizer.name=sgd")
    assert code == 2
    assert "The checkpoint's optimiser is not SGD" in err
    Path("torn.ckpt").write_bytes(whole.read_bytes()[:-200])
    code, err = call("test", "--ckpt_path=torn.ckpt")
    assert code == 2
    assert "torn.ckpt is no whole checkpoint" in err
    torch.save({"weight": torch.zeros(1)}, "bare.ckpt")
    code, err = call("fit", "--ckpt_path=bare.ckpt")
    assert code == 2
    assert "holds no Lightning checkpoint" in err

    code, err = call("predict", "--ckpt_path=last")
    assert code == 0, err
    import pandas as pd

    z, table = np.load("runs/c/predict/embeddings.npy"), pd.read_parquet("runs/c/predict/index.parquet")
    data = DigitsDataModule(batch_size=512)
    assert z.dtype == np.float32
    assert z.shape == (len(data.splits.test), 4)
    assert table["index"].tolist() == list(range(len(z)))
    assert table["label"].tolist() == data.splits.test.label.tolist()
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)


def test_predictions_name_the_images(tmp_path):
    import pandas as pd

    arrays = {"embedding": np.eye(2), "index": np.array([2, 0])}
    write_predictions(tmp_path / "p", arrays, ["a", "b", "c"])
    assert pd.read_parquet(tmp_path / "p/index.parquet")["path"].tolist() == ["c", "a"]
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["embeddings.npy", "index.parquet"]


def test_evaluator_without_any_k():
    assert "at least one k" in sentence(lambda: RetrievalEvaluator(ks=()))
