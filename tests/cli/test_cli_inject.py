"""``nrml inject``: the table holds what training would see, comes whole, and is read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightning_nrml.data import (
    DigitsDataModule,
    FolderDataModule,
    MultiLabelRSDataModule,
    NoiseConfig,
    TableDataModule,
    write_label_table,
)
from lightning_nrml.data.inject import write_noisy_labels

NAMES = ["field", "trees", "water"]


def multi(folder: Path, **kwargs: object) -> MultiLabelRSDataModule:
    return MultiLabelRSDataModule(
        str(folder), table="labels.csv", image_size=4, statistics_folder=str(folder / "kept"), **kwargs
    )


@pytest.fixture
def scenes(folder: Path) -> Path:
    """30 images, 20 of them train, with three labels, and a config."""
    rng = np.random.default_rng(0)
    stems = [f"{i:03d}" for i in range(30)]
    (folder / "Images").mkdir()
    for stem in stems:
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(
            folder / "Images" / f"{stem}.png"
        )
    frame = pd.DataFrame({"image": stems, **{name: rng.integers(0, 2, 30) for name in NAMES}})
    frame["split"] = ["train"] * 20 + ["test"] * 10
    frame.to_csv(folder / "labels.csv", index=False)
    (folder / "rs.yaml").write_text(
        "seed_everything: 3\n"
        "model: {class_path: MultiLabel}\n"
        "data:\n"
        "  class_path: MultiLabelRSDataModule\n"
        "  init_args:\n"
        f"    path: {folder}\n"
        "    table: labels.csv\n"
        "    image_size: 4\n"
        f"    statistics_folder: {folder}/kept\n"
        "    noise: {kind: mixed, rate: 0.5, seed: '${seed_everything}'}\n"
    )
    return folder


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_several_labels(scenes, nrml, suffix) -> None:
    code, out, err = nrml("inject", "--config", "rs.yaml", "--out", f"made/noisy.{suffix}")
    assert (code, err) == (0, "")
    want = multi(scenes, noise=NoiseConfig("mixed", 0.5, 3))
    got = multi(scenes, noise=f"made/noisy.{suffix}")
    assert np.array_equal(got.train_label, want.train_label)
    assert np.array_equal(got.train_is_noise, want.train_is_noise)
    summary = json.loads(Path("made/noisy.json").read_text())
    assert summary["hash"] == want.noise_summary["hash"] == got.noise_summary["hash"]
    assert summary["rate_realised"] == want.noise_summary["rate_realised"]
    clean, given = want.train_clean_label.numpy(), want.train_label.numpy()
    for c, row in enumerate(summary["classes"]):
        lost, extra = (clean[:, c] > given[:, c]).sum(), (clean[:, c] < given[:, c]).sum()
        assert row == {
            "name": NAMES[c],
            "clean": clean[:, c].sum(),
            "given": given[:, c].sum(),
            "removed": lost,
            "added": extra,
        }
        assert lost == int(0.5 * clean[:, c].sum()) > 0
    assert summary["wrong"] == (clean != given).sum()
    assert out.startswith(f"Wrote made/noisy.{suffix}: 20 images, 3 classes, {summary['wrong']} labels wrong")
    assert sorted(p.name for p in Path("made").iterdir()) == sorted(["noisy.json", f"noisy.{suffix}"])


def test_no_image_is_needed(scenes, nrml) -> None:
    before = nrml("inject", "--config", "rs.yaml", "--out", "one.csv")
    for file in (scenes / "Images").iterdir():
        file.write_bytes(b"broken")
    assert nrml("inject", "--config=rs.yaml", "--out=two.csv")[1] == before[1].replace("one.csv", "two.csv")
    assert Path("one.csv").read_bytes() == Path("two.csv").read_bytes()


@pytest.mark.parametrize("kind", ["symmetric", "small_cluster"])
def test_single_labels(folder, nrml, kind) -> None:
    (folder / "d.yaml").write_text("data: {class_path: DigitsDataModule, init_args: {batch_size: 8}}\n")
    (folder / "n.yaml").write_text(f"data: {{init_args: {{noise: {{kind: {kind}, rate: 0.9}}}}}}\n")
    code, out, err = nrml(
        *("inject", "--config", "d.yaml", "--config", "n.yaml", "--out", "noisy.csv"),
        *("--data.init_args.noise.rate", "0.3", "--data.noise.seed=4"),
    )
    assert (code, err) == (0, "")
    want = DigitsDataModule(noise=NoiseConfig(kind, 0.3, 4))
    got = DigitsDataModule(noise="noisy.csv")
    assert np.array_equal(got.train_label, want.train_label)
    assert np.array_equal(got.train_is_noise, want.train_is_noise)
    summary = json.loads(Path("noisy.json").read_text())
    assert summary["truth_known"]
    assert f"{summary['wrong']} labels wrong" in out
    assert summary["hash"] == want.noise_summary["hash"] in out
    assert summary["num_classes"] == want.num_classes == (10 if kind == "symmetric" else 7)
    rows = summary["classes"]
    assert [row["clean"] for row in rows] == np.bincount(DigitsDataModule().train_label).tolist()
    assert sum(row["removed"] for row in rows) == sum(row["added"] for row in rows) == summary["wrong"]
    assert all(row["given"] == row["clean"] - row["removed"] + row["added"] for row in rows)
    if kind == "small_cluster":
        gone = [row for row in rows if row["given"] == 0]
        assert len(gone) == 3
        assert all(row["removed"] == row["clean"] for row in gone)


def test_a_table_of_paths_is_a_set_of_its_own(tmp_path) -> None:
    for i in range(40):
        file = tmp_path / "images" / f"class{i % 4}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), i, dtype=np.uint8)).save(file)
    root = str(tmp_path / "images")
    options = {"split": "images", "train_fraction": 0.8, "image_size": 4}
    data = FolderDataModule(root, noise=NoiseConfig("pair_flip", 0.4, 1), **options)
    write_noisy_labels(data, tmp_path / "t.csv")
    read = TableDataModule(str(tmp_path / "t.csv"), root=root, image_size=4)
    assert read.train_paths == data.train_paths
    assert np.array_equal(read.train_label, data.train_label)
    assert np.array_equal(read.train_clean_label, data.train_clean_label)
    assert np.array_equal(read.splits.train.images.get([3]), data.splits.train.images.get([3]))
    again = FolderDataModule(root, noise=str(tmp_path / "t.csv"), **options)
    assert np.array_equal(again.train_label, data.train_label)


def test_dissolved_classes_stay_dissolved_in_a_set_of_its_own(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    frame = pd.DataFrame({"path": [f"{i}.png" for i in range(60)], "label": np.arange(60) % 6})
    frame.to_csv(tmp_path / "set.csv", index=False)

    def read(table: str, noise: object = None) -> TableDataModule:
        return TableDataModule(str(tmp_path / table), noise=noise, image_size=4)

    want = read("set.csv", NoiseConfig("small_cluster", 0.5))
    write_noisy_labels(want, tmp_path / "noisy.csv")
    got = read("noisy.csv")
    assert (got.num_classes, got.class_names) == (want.num_classes, want.class_names) == (3, list("045"))
    assert np.array_equal(got.train_label, want.train_label)
    assert np.array_equal(got.train_clean_label, want.train_clean_label)
    assert got.noise_summary["rate_realised"] == 0.5
    # such a set takes corrected labels, whose noise is measured, and written
    corrected = {"index": np.arange(60), "label": want.train_label.numpy() % 2, "keep": np.arange(60) > 5}
    write_label_table(tmp_path / "corrected.csv", corrected)
    again = read("noisy.csv", tmp_path / "corrected.csv")
    assert np.array_equal(again.train_is_noise, want.train_clean_label != want.train_label % 2)
    summary = write_noisy_labels(again, tmp_path / "again.csv")
    assert [row["clean"] for row in summary["classes"]] == [10, 10, 10]


def test_samples_of_one_image_keep_their_name(tmp_path) -> None:
    frame = pd.DataFrame({"path": [f"{i % 10}.png" for i in range(12)], "label": np.arange(12) % 2})
    frame.to_csv(tmp_path / "set.csv", index=False)
    for path in frame["path"]:
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    data = TableDataModule(str(tmp_path / "set.csv"), noise=NoiseConfig("symmetric", 0.5), image_size=4)
    with pytest.warns(UserWarning, match="2 rows have the image of an earlier row"):
        write_noisy_labels(data, tmp_path / "noisy.csv")
    with pytest.warns(UserWarning, match="2 rows have the image of an earlier row"):
        read = TableDataModule(str(tmp_path / "noisy.csv"), image_size=4).train_paths
    assert read == frame["path"].tolist()


def test_samples_left_out_stay_out(tmp_path) -> None:
    frame = pd.DataFrame({"path": [f"{i}.png" for i in range(12)], "label": np.arange(12) % 3})
    frame["keep"] = np.arange(12) % 4 > 0
    frame.to_csv(tmp_path / "set.csv", index=False)
    for path in frame["path"]:
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    data = TableDataModule(str(tmp_path / "set.csv"), noise=NoiseConfig("symmetric", 0.5), image_size=4)
    write_noisy_labels(data, tmp_path / "noisy.csv")
    read = TableDataModule(str(tmp_path / "noisy.csv"), image_size=4)
    assert read.train_keep.tolist() == data.train_keep.tolist() == frame["keep"].tolist()


def test_mistakes_are_told_and_nothing_is_written(scenes, nrml) -> None:
    assert nrml("inject", "--config", "rs.yaml", "--out", "there.csv")[0] == 0
    old = Path("there.csv").read_bytes()
    for args, words in (
        (["--out", "there.csv"], "there.csv exists: give another name, or --force"),
        (["--out", "there.parquet"], "there.json exists"),
        (["--out", "x.txt"], "the suffix of a label table must be one of .csv, .parquet"),
        (
            ["--out", "x.csv", "--data.init_args.noise.kind=none"],
            "MultiLabelRSDataModule has no noise to write",
        ),
        (["--out", "x.csv", "--data.init_args.noise.rte=1"], "no argument 'rte'; did you mean 'rate'?"),
        (["--out", "x.csv", "--trainer.max_epochs=1"], "--trainer.max_epochs=1: nrml inject takes --config"),
        (["--out", "x.csv", "--data.init_args.noise.rate=2"], "noise.rate must lie in [0, 1]"),
        (["--out", "x.csv", "--data.init_args.table=no.csv"], "no label table"),
    ):
        code, _, err = nrml("inject", "--config", "rs.yaml", *args)
        assert code == 2
        assert err.startswith("nrml: ")
        assert words in err
    Path("odd.yaml").write_text("data: {class_path: DigitsDataModul}\n")
    assert "did you mean 'DigitsDataModule'" in nrml("inject", "--config", "odd.yaml", "--out", "x.csv")[2]
    Path("none.yaml").write_text("trainer: {max_epochs: 1}\n")
    assert "none.yaml has no data section" in nrml("inject", "--config", "none.yaml", "--out", "x.csv")[2]
    assert "No config file or recipe" in nrml("inject", "--config", "nowhere", "--out", "x.csv")[2]
    assert Path("there.csv").read_bytes() == old
    assert not list(Path().glob("x.*"))
    assert (
        nrml("inject", "--config", "rs.yaml", "--out", "there.csv", "--data.noise.seed=4", "--force")[0] == 0
    )
    assert Path("there.csv").read_bytes() != old


def test_labels_that_a_table_replaces_are_not_called_wrong(folder, nrml) -> None:
    """Nothing says that the images' own labels are the truth."""
    label = DigitsDataModule().train_label.numpy().copy()
    label[:7] = (label[:7] + 1) % 10
    lines = ["index,label", *(f"{i},{c}" for i, c in enumerate(label))]
    Path("theirs.csv").write_text("\n".join(lines))
    (folder / "d.yaml").write_text("data: {class_path: DigitsDataModule, init_args: {noise: theirs.csv}}\n")
    code, out, err = nrml("inject", "--config", "d.yaml", "--out", "noisy.csv")
    assert (code, err) == (0, "")
    assert "7 labels changed" in out
    assert not json.loads(Path("noisy.json").read_text())["truth_known"]
