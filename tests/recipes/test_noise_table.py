"""The command behind the noise tables: arguments, ledgers, means, and the judges of embeddings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import noise_frozen
import noise_settings
import noise_table
import numpy as np
import pandas as pd
import pytest
import torch

from lightning_nrml.cli.check import check_override, load_yaml
from lightning_nrml.cli.recipes import config_arguments

SETTINGS = {setting.name: setting for setting in noise_table.settings(Path("data"))}


# settings and methods choose different keys, so each needs to be seen once only
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "prism_vmf") for name in SETTINGS]
    + [("caltech101_50", method) for method in noise_table.METHODS],
)
def test_commands_name_real_recipes_and_keys(name: str, method: str, tmp_path: Path) -> None:
    args = noise_settings.command(SETTINGS[name], method, 3, tmp_path)
    (_, config), *_ = config_arguments(args)
    tree = load_yaml(Path(config))
    for word in args[1:]:
        key, _, value = word[2:].partition("=")
        if key != "config":
            assert check_override(key, value, tree) is None, word
    assert "--seed_everything=3" in args
    assert any("3" in word for word in args if word.startswith("--data.init_args."))
    assert not any("{" in word for word in args if word.startswith("--data."))


def test_every_filter_is_told_the_true_rate_or_none() -> None:
    for setting in SETTINGS.values():
        for method in noise_table.METHODS:
            _, *filters = noise_settings.callbacks(setting, method)
            told = [c["init_args"]["noise_rate"] for c in filters if "noise_rate" in c.get("init_args", {})]
            untold = ("bare", "consensus", "consensus_softmax")
            without = (*noise_table.FROZEN, *noise_table.UNFILTERED)
            silent = method in without or method.removeprefix(noise_settings.SHUFFLED) in untold
            expected = [] if silent else [setting.rate]
            assert told == expected, (setting.name, method)


def test_cleaned_labels_are_those_of_the_same_seed_and_nothing_else_is_injected(tmp_path: Path) -> None:
    folder = tmp_path / "digits_50" / "cleaned" / "seed2"
    args = noise_settings.command(SETTINGS["digits_50"], "cleaned", 2, folder)
    assert [word for word in args if "init_args.noise" in word] == [
        f"--data.init_args.noise={tmp_path}/digits_50/frozen/seed2/audit/labels_corrected.csv"
    ]


def test_a_part_of_cifar_holds_the_first_images_with_their_labels(tmp_path: Path) -> None:
    jpeg = [np.frombuffer(bytes([i] * (i + 1)), dtype=np.uint8) for i in range(5)]
    labels = {f"{kind}_label": np.arange(5) + 10 * k for k, kind in enumerate(("clean", "worse"))}
    arrays = {
        "train_jpeg": np.concatenate(jpeg), "train_offsets": np.cumsum([0, *map(len, jpeg)]), **labels,
        "random_label1": np.arange(5), "test_jpeg": jpeg[4], "test_offsets": np.array([0, 5]),
        "test_label": np.arange(1), "class_names": np.array(["a"]),
    }  # fmt: skip
    np.savez(tmp_path / "all.npz", **arrays)
    setting = replace(SETTINGS["cifar10n_10k_worse"], part=(tmp_path / "all.npz", 3))
    noise_table.prepare(setting, tmp_path / "out")
    with np.load(noise_settings.part_of(setting, tmp_path / "out")) as part:
        found = {key: part[key].tolist() for key in part.files}
    assert found == {key: value.tolist() for key, value in arrays.items()} | {
        "train_jpeg": [0, 1, 1, 2, 2, 2], "train_offsets": [0, 1, 3, 6], "clean_label": [0, 1, 2],
        "worse_label": [10, 11, 12], "random_label1": [0, 1, 2],
    }  # fmt: skip
    assert list((tmp_path / "out").iterdir()) == [noise_settings.part_of(setting, tmp_path / "out")]
    folder = tmp_path / "out" / setting.name / "none" / "seed0"
    path = f"--data.init_args.path={noise_settings.part_of(setting, tmp_path / 'out')}"
    assert path in noise_settings.command(setting, "none", 0, folder)


def run(folder: Path, last: dict, ledger: pd.DataFrame | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"last": last, "best": {}, "cpu_seconds": 1.0}))
    if ledger is not None:
        ledger.to_parquet(folder / "noise_ledger.parquet")


def test_tables_from_finished_runs(tmp_path: Path) -> None:
    scores = {"val/recall@1": 0.5, "val/map@r": 0.2}
    decided = {"noise/precision": 0.75, "noise/recall": 0.6, "noise/auroc": 0.1}
    ledger = pd.DataFrame(
        {"label": [0, 0, 1, 1, 1], "clean_label": [0, 1, 1, 0, 1], "log_p_clean": [-1, -2, -3, -4, np.nan]}
    )
    run(tmp_path / "digits_50" / "none" / "seed0", scores)
    run(tmp_path / "digits_50" / "bare" / "seed0", scores | decided, ledger)
    for method in noise_table.FROZEN:
        run(tmp_path / "digits_50" / method / "seed0", scores)
    found = {k: dict.fromkeys(noise_table.QUALITY, 0.25 * i) for i, k in enumerate(noise_table.SCORERS)}
    (tmp_path / "digits_50" / "frozen" / "seed0" / "detection.json").write_text(json.dumps(found))
    found["audit"] |= {"auroc": 0.99, "noise_rate": 0.3}
    for method in ("consensus_frozen", "shuffled_frozen"):
        (tmp_path / "digits_50" / method / "seed0" / "detection.json").write_text(json.dumps(found))

    rows = noise_table.collect(tmp_path, Path("data"))
    assert [row["method"] for row in rows] == ["none", "bare"]
    assert "| cross-entropy + BARE (not told the rate) | 1 | 0.500 | 0.200 | – | 0.750 | 0.600 | 0.100 |" in (
        noise_table.table(SETTINGS["digits_50"], rows)
    )
    detection = noise_table.collect_detection(tmp_path, Path("data"))
    after = [f"{start}_{name}" for start in ("consensus", "shuffled") for name in noise_table.SCORERS]
    assert [row["method"] for row in detection] == ["bare", *noise_table.SCORERS, *after]
    aurocs = {row["method"]: row["auroc"] for row in detection}
    assert (aurocs["audit"], aurocs["consensus_audit"]) == (0, 0.99)
    rates = {row["method"]: row["noise_rate"] for row in detection}
    assert (rates["bare"], rates["audit"], rates["consensus_audit"]) == (None, None, 0.3)
    assert detection[0]["wrong"] == 2 / 5
    # wrong are -2 and -4, right -1 and -3: three of four pairs in order; precision 1, then 2/3
    assert detection[0]["auroc"] == pytest.approx(3 / 4)
    assert detection[0]["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    text = noise_table.detection_table(SETTINGS["digits_50"], detection)
    assert "| cross-entropy + BARE (not told the rate) | 1 | 0.750 | 0.600 | 0.750 | 0.833 |" in text
    assert "| `nrml audit --evidence knn` | 1 | 0.250 | 0.250 | 0.250 | 0.250 |" in text
    assert noise_table.detection_table(SETTINGS["omniglot_50"], detection) == ""


def test_an_overview_has_means_and_says_where_seeds_lack() -> None:
    values = {"none": [0.5, 0.6, 0.7], "consensus": [0.9], "bare": [0.1]}
    rows = [
        {"setting": "digits_50", "method": method, "seed": seed, "val/recall@1": value}
        for method, own in values.items()
        for seed, value in enumerate(own)
    ]
    columns = noise_table.OVERVIEWS["noise overview"]
    head, rule, *lines = noise_table.overview(list(SETTINGS.values()), rows, columns).splitlines()
    assert (head.count("|"), rule.count("|")) == (10, 10)
    assert lines == ["| scikit-learn digits, 50 % symmetric | 0.600 | – | 0.900 (1) | – | – | – | – | – |"]


def test_the_overview_of_rates_puts_what_was_found_beside_what_there_is() -> None:
    measured = {"shuffled_consensus": (0.48, 0.42), "shuffled_audit": (None, 0.47), "bare": (0.48, None)}
    rows = [
        {"setting": "digits_50", "method": method, "seed": seed, "wrong": wrong, "noise_rate": rate}
        for method, (wrong, rate) in measured.items()
        for seed in range(3)
    ]
    rows.append({"setting": "digits_50", "method": "shuffled_cleanlab", "seed": 0})  # published without
    _, _, *lines = noise_table.overview(
        list(SETTINGS.values()), rows, noise_table.OVERVIEWS["rate overview"]
    ).splitlines()
    assert lines == ["| scikit-learn digits, 50 % symmetric | 0.480 | 0.420 | 0.470 | – |"]


def test_a_gap_is_only_told_where_the_noise_costs_something() -> None:
    scores = {"none": (0.50, 0.20), "prism_avg": (0.56, 0.21), "known_clean": (0.60, 0.21)}
    bounds = {"shuffled_cross_entropy": (0.60, 0.2), "shuffled_known_clean": (0.70, 0.3)}
    scores |= bounds | {"shuffled_small_loss": (0.65, 0.225), "small_loss": (0.55, 0.2), "tsint": (0.7, 0.3)}
    rows = [
        dict.fromkeys(noise_table.COLUMNS) | {"setting": "digits_50", "method": method, "seed": 0}
        | {"val/recall@1": recall, "val/map@r": map_r}
        for method, (recall, map_r) in scores.items()
    ]  # fmt: skip
    text = noise_table.table(SETTINGS["digits_50"], rows)
    assert "| PRISM AvgSim | 1 | 0.560 | 0.210 | +0.60 / – |" in text  # MAP@R: .01 of .01 is no news
    assert "| cross-entropy, shuffled batches + small loss | 1 | 0.650 | 0.225 | +0.50 / +0.25 |" in text
    # nothing was run with and without knowing the right labels, but else as these
    assert "| cross-entropy + small loss | 1 | 0.550 | 0.200 | – |" in text
    assert "| T-SINT (pairs; no memory) | 1 | 0.700 | 0.300 | – |" in text


def test_labels_are_turned_by_an_audit_of_the_net_of_the_same_seed(tmp_path: Path) -> None:
    folder = tmp_path / "caltech101_50" / "shuffled_relabelled_cross_entropy" / "seed1"
    audit, fit = noise_settings.stages(SETTINGS["caltech101_50"], folder.parent.name, 1, folder)
    kept = tmp_path / "caltech101_50" / "shuffled_frozen" / "seed1"
    assert audit[0] == "audit"
    assert f"--ckpt_path={kept}/checkpoints/last.ckpt" in audit
    assert f"--out={folder}/audit" in audit
    assert f"--data.init_args.noise={folder}/audit/labels_corrected.csv" in fit
    assert [fit] == noise_settings.stages(SETTINGS["caltech101_50"], folder.parent.name, 1, folder)[1:]
    assert len(noise_settings.stages(SETTINGS["caltech101_50"], "none", 1, folder)) == 1


def test_shuffled_batches_are_as_many_as_the_recipe_draws_and_cross_entropy_is_alone(tmp_path: Path) -> None:
    for name, steps in (("caltech101_50", 3904 // 64), ("cifar10n_worse", 24960 // 128), ("digits_50", 20)):
        args = noise_settings.command(SETTINGS[name], "shuffled_consensus_softmax", 0, tmp_path)
        assert f"--trainer.limit_train_batches={steps}" in args
        assert args.index("--data.init_args.m_per_class=null") > 2
        last = [word for word in args if word.startswith("--data.init_args.epoch_length=")][-1]
        assert last.endswith("=null")
        assert "--model.init_args.memory_size=0" in args
        (loss,) = [json.loads(word.partition("=")[2]) for word in args if ".loss=" in word]
        assert loss["class_path"] == "CosineSoftmaxLoss"
    args = noise_settings.command(SETTINGS["omniglot_20"], "shuffled_cross_entropy", 0, tmp_path)
    assert "--data.init_args.m_per_class=1" in args


def test_out_of_fold_probabilities_do_not_know_their_own_label() -> None:
    g = np.random.default_rng(0)
    clean = np.arange(120) % 3
    x = (np.eye(3)[clean] * 4 + g.normal(size=(120, 3))).astype(np.float32)
    label = np.where(g.random(120) < 0.3, (clean + 1) % 3, clean)
    _, probability = noise_frozen.out_of_fold(x, label)
    assert probability.sum(1) == pytest.approx(1)
    assert (probability.argmax(1) == clean).mean() > 0.95
    other = label.copy()
    other[7] = (label[7] + 1) % 3
    _, changed = noise_frozen.out_of_fold(x, other)
    assert changed[7] == pytest.approx(probability[7], abs=0.1)


def test_both_judges_find_wrong_labels_and_share_the_embedding() -> None:
    pytest.importorskip("cleanlab", reason="the extra 'bench' is not installed")
    g = torch.Generator().manual_seed(0)
    clean = torch.arange(300) % 5
    x = torch.nn.functional.one_hot(clean, 5).float() * 3 + torch.randn(300, 5, generator=g)
    wrong = torch.rand(300, generator=g) < 0.3
    label = torch.where(wrong, (clean + 1 + torch.randint(4, (300,), generator=g)) % 5, clean)
    found = noise_frozen.judge(x.numpy(), label.numpy(), clean.numpy(), 5)
    assert list(found) == list(noise_frozen.SCORERS)
    for name, quality in found.items():
        assert quality["auroc"] > 0.9, name
        assert quality["precision"] > 0.85, name
