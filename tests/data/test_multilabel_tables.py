"""Tables of images and labels: how images are named, what is no label, lists, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightning_nrml.data import MultiLabelRSDataModule, NoiseConfig
from lightning_nrml.data.inject import write_noisy_labels
from lightning_nrml.data.multilabel_tables import find_images, read_label_lists, read_multilabel_table
from lightning_nrml.data.multilabel_writing import multilabel_frame, write_multilabel_table

SPLIT = ["train"] * 6 + ["val", "test"]


def frame(images=None, **columns) -> pd.DataFrame:
    """Eight images with labels a and b."""
    rows = {"image": images or [f"{i}.png" for i in range(8)], "a": [0, 1] * 4, "b": [0, 0, 1, 1] * 2}
    return pd.DataFrame({**rows, "split": SPLIT, **columns})


def make(folder: Path, table: pd.DataFrame, name: str = "labels.csv", **settings) -> MultiLabelRSDataModule:
    for i in range(8):
        file = folder / "img" / "sub" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
        Image.new("RGB", (8, 8)).save(folder / "img" / f"{i}.png")
    write = table.to_parquet if name.endswith("parquet") else table.to_csv
    write(folder / name, index=False)
    given = {"table": name, "images": "img", "image_size": 8, "batch_size": 2}
    return MultiLabelRSDataModule(
        str(folder), **{**given, "statistics_folder": str(folder / "cache"), **settings}
    )


@pytest.mark.parametrize("other", ["./0.png", "sub/../0.png", "absolute"])
def test_an_image_in_two_rows_is_named_however_it_is_spelled(tmp_path, other):
    name = str(tmp_path / "img" / "0.png") if other == "absolute" else other
    table = frame([*(f"{i}.png" for i in range(7)), name])
    with pytest.raises(ValueError, match=r"0\.png.*rows 0 and 7.*keep one row per image"):
        make(tmp_path, table).num_classes
    if other != "absolute":  # no folder need be known, so tables of noise are checked, too
        with pytest.raises(ValueError, match=r"labels\.csv: image .* rows 0 and 7, there as '0\.png'"):
            read_multilabel_table(tmp_path / "labels.csv")


def test_names_may_lack_the_suffix_and_be_surrounded_by_blanks(tmp_path):
    data = make(tmp_path, frame([f"sub/{i:03d}" for i in range(4)] + [f" {i:03d} " for i in range(4, 8)]))
    assert data.train_paths == ["sub/000", "sub/001", "sub/002", "sub/003", "004", "005"]
    assert [data.splits.train.images.name(i) for i in (1, 5)] == [
        str(tmp_path / "img" / "sub" / f"{i:03d}.png") for i in (1, 5)
    ]
    with pytest.raises(ValueError, match=r"images 'sub/000' and '000' \(rows 0 and 7\) are one file"):
        make(tmp_path, frame([f"sub/{i:03d}" for i in range(7)] + ["000"])).num_classes
    # for pictures it does not matter
    assert len(set(find_images(["sub/000", "000"], tmp_path / "img", once=False))) == 1
    (tmp_path / "img" / "sub" / "002.jpg").touch()
    with pytest.raises(ValueError, match=r"image 'sub/002' is both .*002\.jpg and .*002\.png"):
        find_images(["sub/002"], tmp_path / "img")


def test_digits_are_names_wherever_the_column_stands(tmp_path):
    table = frame([f"{i:03d}" for i in range(8)])
    table.insert(0, "area", 1)
    data = make(tmp_path, table, image_column="image", label_columns=["a", "b"])
    assert data.train_paths == ["000", "001", "002", "003", "004", "005"]
    assert data.splits.train.images.missing() == []
    # what an audit wrote has them in its own first column
    (tmp_path / "audited.csv").write_text("path,a\n007,1\n008,0\n")
    assert read_multilabel_table(tmp_path / "audited.csv", "image").images == ["007", "008"]


def test_a_table_knows_the_truth_only_if_all_of_its_rows_say_so(tmp_path):
    for said, known in (("True,True", True), ("1,1", True), ("True,False", False), ("False,False", False)):
        one, two = said.split(",")
        (tmp_path / "a.csv").write_text(f"image,a,clean_known\n0,1,{one}\n1,0,{two}\n")
        table = read_multilabel_table(tmp_path / "a.csv")
        assert (table.clean_known, table.names) == (known, ["a"])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_empty_cells_are_named_by_row(tmp_path, suffix):
    name = f"labels.{suffix}"
    lost = [None if i == 2 else f"{i}.png" for i in range(8)]
    for skip in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"labels.*column 'image', row 2: empty \(1 such\); fill it"):
            make(tmp_path, frame(lost), name, on_bad_image=skip).num_classes
    for word, shown in ((None, "an empty cell"), ("Train ", "'Train '")):
        split = [word if i == 3 else s for i, s in enumerate(SPLIT)]
        with pytest.raises(ValueError, match=rf"row 3 \(3\.png\): {shown} is no split; accepted are train"):
            make(tmp_path, frame(split=split), name).num_classes
    # a column of splits that nobody asks for may hold anything
    (tmp_path / "all.txt").write_text("0.png\n3.png\n")
    data = make(tmp_path, frame(split=split), name, splits={"train": "all.txt"})
    assert data.train_paths == ["0.png", "3.png"]
    label = pd.Series([True, False] * 4, dtype="boolean")
    label[2] = pd.NA
    with pytest.raises(ValueError, match=r"row 2 \(2\.png\), column 'a': an empty cell \(1 such\)"):
        make(tmp_path, frame(a=label), name).num_classes


def test_lists_of_windows_programs(tmp_path):
    text = "\n".join(f"{i}.png" for i in range(8))
    (tmp_path / "list.txt").write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8")
    data = make(tmp_path, frame(), splits={"train": "list.txt"})
    assert data.num_train_samples == 8
    (tmp_path / "list.txt").write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=r"list\.txt is not in UTF-8"):
        make(tmp_path, frame(), splits={"train": "list.txt"}).num_classes


def test_a_label_is_wanted_once(tmp_path):
    with pytest.raises(ValueError, match="label_columns names 'a' 2 times"):
        make(tmp_path, frame(), label_columns=["a", "b", "a"]).num_classes


def test_what_is_called_like_a_remark_is_no_label(tmp_path):
    table = frame(marks=[0, 1] * 4)
    for settings in ({}, {"label_columns": ["a", "marks"]}):
        with pytest.raises(ValueError, match=r"labels\.csv: 'marks' is a column of remarks.*rename"):
            make(tmp_path, table, **settings).num_classes
    assert make(tmp_path, table, label_columns=["a", "b"]).class_names == ["a", "b"]
    remarks = frame(marks=["0:wrong", *[""] * 7], doubted="")
    assert make(tmp_path, remarks).class_names == ["a", "b"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("label", ["a", "image", "path"])
def test_injected_noise_is_read_by_the_same_config(tmp_path, suffix, label):
    table = frame().rename(columns={"image": "file"}).rename(columns={"a": label})
    table.insert(0, "area", 1)
    settings = {"image_column": "file", "label_columns": [label, "b"]}
    noisy = make(tmp_path, table, noise=NoiseConfig("mixed", 0.5), **settings)
    out = tmp_path / f"noisy.{suffix}"
    write_noisy_labels(noisy, out)
    read = make(tmp_path, table, noise=str(out), **settings)
    assert read.class_names == [label, "b"]
    assert np.array_equal(read.train_label, noisy.train_label)
    assert np.array_equal(read.train_is_noise, noisy.train_is_noise)
    assert json.loads(out.with_suffix(".json").read_text())["hash"] == read.noise_summary["hash"]


def test_a_column_of_images_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no column 'name'; its columns are file, a, b, split"):
        make(tmp_path, frame().rename(columns={"image": "file"}), image_column="name").num_classes


def test_scores_are_found_by_the_column_of_images(tmp_path):
    table = frame([f"{i:03d}" for i in range(8)])
    table.insert(0, "area", 1)
    settings = {"image_column": "image", "label_columns": ["a", "b"]}
    score = np.random.default_rng(0).normal(size=8)
    given = []
    for columns in (["area", "image", "a", "b"], ["image", "a", "b"]):
        table.assign(a=score, b=-score)[columns].to_csv(tmp_path / "scores.csv", index=False)
        config = NoiseConfig("scores", 0.5, scores=str(tmp_path / "scores.csv"))
        given.append(make(tmp_path, table, noise=config, **settings).train_label.tolist())
    assert given[0] == given[1] != table[["a", "b"]].head(6).to_numpy().tolist()


def test_lists_of_label_names_need_names_of_images(tmp_path):
    rows = {"image": ["0.png", None], "labels": [["a"], ["b"]]}
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="column 'image', row 1: empty"):
        read_label_lists(tmp_path / "t.parquet", ["a", "b"], {"a": 0, "b": 1})


def test_writing_refuses_what_cannot_be_read(tmp_path):
    label, out = np.eye(2), tmp_path / "t.csv"
    for names in (["a", "a"], ["a", "doubted"]):
        with pytest.raises(
            ValueError, match=rf"t\.csv would have two columns '{names[1]}'; rename the label"
        ):
            write_multilabel_table(out, ["0", "1"], label, names)
    with pytest.raises(ValueError, match=r"t\.csv: image '0' stands in rows 0 and 1"):
        write_multilabel_table(out, ["0", "0"], label, ["a", "b"])
    assert not out.exists()
    names = ["path", "path_"]
    multilabel_frame(["0", "1"], label, names, "path").to_csv(out, index=False)
    read = read_multilabel_table(out, "file")
    assert (read.images, read.names, read.label.tolist()) == (["0", "1"], names, [[1, 0], [0, 1]])


def test_blanks_after_the_commas_of_a_csv(tmp_path):
    head, *rows = frame().to_csv(index=False).splitlines()
    rows = [row.replace(",", ", ") for row in rows]
    plain, blank = make(tmp_path, frame()), make(tmp_path, frame(), "blank.csv")
    (tmp_path / "blank.csv").write_text("\n".join([head.replace(",", ", "), *rows]) + "\n")
    assert blank.class_names == ["a", "b"]
    assert blank.train_label.tolist() == plain.train_label.tolist()


def test_names_of_images_as_bytes_in_parquet(tmp_path):
    names = [f"{i}.png".encode() for i in range(8)]
    assert make(tmp_path, frame(names), "labels.parquet").train_paths == [f"{i}.png" for i in range(6)]
