"""The command behind the table of self-supervised methods: subsets, arguments and means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ssl_table

from lightning_nrml.cli.check import check_override, load_yaml
from lightning_nrml.cli.recipes import config_arguments

SETTINGS = {setting.name: setting for setting in ssl_table.settings()}


def test_unseen_classes_are_split_by_image(tmp_path: Path) -> None:
    label = np.array([0, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1], np.int16)
    names = np.array(["a", "b", "c"])
    arrays = {
        "label": label,
        "train_class": label == 0,
        "balanced60": np.arange(11) != 3,
        "class_names": names,
    }
    jpeg, offsets = np.arange(22, dtype=np.uint8), np.arange(0, 24, 2)
    np.savez(tmp_path / "all.npz", jpeg=jpeg, offsets=offsets, **arrays)
    ssl_table.prepare(SETTINGS["caltech101"], tmp_path / "all.npz", tmp_path / "x" / "part.npz")
    part = np.load(tmp_path / "x" / "part.npz")
    assert part["label"].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert part["train"].tolist() == [True, True, True, True, True, False, True, False, True]
    assert part["offsets"].tolist() == list(range(0, 20, 2))
    assert part["jpeg"].tolist() == [*range(2, 6), *range(8, 22)]
    assert part["class_names"].tolist() == ["b", "c"]


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("method", list(ssl_table.METHODS))
def test_commands_name_real_recipes_and_keys(name: str, method: str, tmp_path: Path) -> None:
    stages = ssl_table.commands(SETTINGS[name], method, 3, tmp_path, tmp_path / "a", tmp_path / "b", None)
    assert len(stages) == (2 if method in ssl_table.LEARNED else 1)
    for args in stages:
        assert "--seed_everything=3" in args
        (_, config), *_ = config_arguments(args)
        tree = load_yaml(Path(config))
        for word in args[1:]:
            key, _, value = word[2:].partition("=")
            if key != "config":
                assert check_override(key, value, tree) is None, word
    probe = stages[-1]
    start = f"--model.init_args.init_weights={tmp_path / 'pretrain' / 'checkpoints' / 'last.ckpt'}"
    assert (start in probe) == (method in ssl_table.LEARNED)


def test_table_has_means_over_the_seeds(tmp_path: Path) -> None:
    for seed, value in enumerate((0.5, 0.7)):
        folder = tmp_path / "digits" / "byol" / f"seed{seed}"
        folder.mkdir(parents=True)
        done = {"knn_top1": value, "probe_top1": value + 0.1, "cpu_seconds": 1.0}
        (folder / "done.json").write_text(json.dumps(done))
    rows = ssl_table.collect(tmp_path)
    assert [(r["seed"], r["knn_top1"], r["map@r"]) for r in rows] == [(0, 0.5, None), (1, 0.7, None)]
    text = ssl_table.table(SETTINGS["digits"], rows)
    assert "| method | seeds | kNN top-1 | linear top-1 |" in text
    assert "| BYOL | 2 | 0.600 ± 0.141 | 0.700 ± 0.141 |" in text
    assert ssl_table.table(SETTINGS["cifar10"], rows) == ""
