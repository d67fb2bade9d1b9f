"""Label tables: round trips, atomic writing, and errors that name file, column and row."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_nrml.data import tables
from lightning_nrml.data.tables import match_rows, read_label_table, write_label_table

SUFFIX = pytest.mark.parametrize("suffix", [".csv", ".parquet"])


def full_table():
    return pd.DataFrame(
        {
            "index": [2, 0, 1],
            "path": ["NA", "007", "a,b/ü.png"],
            "label": [3, -1, 0],
            "clean_label": [3, 1, -1],
            "weight": [0.25, 1.0, 0.0],
            "keep": [True, False, True],
            "is_noise": [False, True, False],
            "note": ["x", "y", "z"],
        }
    )


@SUFFIX
def test_round_trip_keeps_values_order_and_types(tmp_path, suffix):
    path = tmp_path / "new folder" / f"labels{suffix}"
    assert write_label_table(path, full_table()) == path
    back = read_label_table(path)
    pd.testing.assert_frame_equal(back, full_table(), check_dtype=False)
    assert [str(back[c].dtype) for c in ("index", "label", "clean_label")] == ["int64"] * 3
    assert [str(back[c].dtype) for c in ("weight", "keep", "is_noise")] == ["float64", "bool", "bool"]


@SUFFIX
def test_columns_of_tensors_and_arrays_are_written(tmp_path, suffix):
    path = tmp_path / f"labels{suffix}"
    write_label_table(
        path, {"index": torch.arange(3), "label": np.array([2, 1, 0]), "keep": torch.ones(3) > 0}
    )
    back = read_label_table(str(path))
    assert back["label"].tolist() == [2, 1, 0]
    assert back["keep"].all()


def test_large_ids_and_whole_floats_stay_exact(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(f"index,label\n{2**53 + 1},16777217\n1,4.0\n")
    back = read_label_table(path)
    assert back["index"].tolist() == [2**53 + 1, 1]
    assert back["label"].tolist() == [16777217, 4]


def test_another_label_column(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("index,worst,keep\n0,5,1\n1,6,false\n")
    back = read_label_table(path, "worst")
    assert back["worst"].tolist() == [5, 6]
    assert back["keep"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,label\n0,1\n1,\n", "column 'label', row 1: an empty cell; whole numbers"),
        ("index,label\n0,1\n1,nan\n", "column 'label', row 1: 'nan'"),
        ("index,label\n0,cat\n", "column 'label', row 0: 'cat'"),
        ("index,label\n0,1.5\n", "column 'label', row 0: 1.5"),
        ("index,label\n0,-2\n", r"row 0: -2; .*at least -1 .*\(-1 = unlabelled\)"),
        ("index,label\n0,inf\n", "column 'label', row 0: inf"),
        ("index,label\n-1,0\n", "column 'index', row 0: -1; .*at least 0"),
        ("index,label\n4,0\n5,0\n4,1\n", "column 'index', row 2: 4; it occurs in an earlier row"),
        ("path,label\na,0\na,0\n", "column 'path', row 1: 'a'; it occurs in an earlier row"),
        ("path,label\na,0\n,0\n", "column 'path', row 1: an empty cell"),
        ("index,path,label\n0,a,0\n0,a,0\n", "column 'index', row 1: 0; it occurs in an earlier row"),
        ("index,label,clean_label\n0,0,x\n", "column 'clean_label', row 0: 'x'"),
        ("index,label,weight\n0,0,1\n1,0,1.5\n", r"column 'weight', row 1: 1.5; numbers in \[0, 1\]"),
        ("index,label,keep\n0,0,yes\n", "column 'keep', row 0: 'yes'; true/false or 1/0"),
        ("index,given\n0,0\n", "no column 'label'; its columns are: index, given"),
        ("label\n0\n", "needs a column 'index' or 'path'; its columns are: label"),
        ("index,label\n", "has no rows"),
        ("", "not readable as csv"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_label_table(path)
    assert str(path) in str(error.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.csv' does not exist"):
        read_label_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"labels.txt': the suffix must be one of .csv, .parquet"):
        read_label_table(tmp_path / "labels.txt")
    (tmp_path / "labels.parquet").write_text("index,label\n0,0\n")
    with pytest.raises(ValueError, match=r"labels.parquet' is not readable as parquet"):
        read_label_table(tmp_path / "labels.parquet")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    """The shell leaves the ``~`` of ``--data.init_args.noise=~/labels.csv`` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_label_table("~/labels.csv", {"index": [0], "label": [3]})
    assert (tmp_path / "labels.csv").is_file()
    assert read_label_table("~/labels.csv")["label"].tolist() == [3]


@SUFFIX
def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"labels{suffix}"
    write_label_table(path, {"index": [0], "label": [7]})
    with pytest.raises(ValueError, match="row 0"):
        write_label_table(path, {"index": [0], "label": [-5]})

    def full_disk(source, target):
        assert os.path.getsize(source) > 0  # all is written before the old file is touched
        raise OSError("no space left on device")

    monkeypatch.setattr(tables.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_label_table(path, {"index": [0], "label": [8]})
    assert read_label_table(path)["label"].tolist() == [7]
    assert os.listdir(tmp_path) == [path.name]


@SUFFIX
def test_an_index_tells_samples_of_one_image_apart(tmp_path, suffix):
    path = write_label_table(tmp_path / f"t{suffix}", {"index": [0, 1], "path": ["a", "a"], "label": [3, 4]})
    back = read_label_table(path)
    assert (back["path"].tolist(), match_rows(back, "t", 2, ["a", "a"]).tolist()) == (["a", "a"], [0, 1])


def test_nullable_cells_without_a_value_are_named(tmp_path):
    for column, kind in (("keep", "boolean"), ("label", "Int64"), ("weight", "Float64")):
        rows = {"index": [0, 1], "label": [0, 1], column: pd.array([1, None], dtype=kind)}
        pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
        with pytest.raises(ValueError, match=rf"t\.parquet', column '{column}', row 1: an empty cell; "):
            read_label_table(tmp_path / "t.parquet")


def test_writing_does_not_change_the_callers_frame(tmp_path):
    frame = pd.DataFrame({"index": ["0", "1"], "label": [1.0, 2.0]}, index=[7, 3])
    before = frame.copy()
    write_label_table(tmp_path / "labels.csv", frame)
    pd.testing.assert_frame_equal(frame, before)


def test_match_rows_by_index_or_path():
    frame = pd.DataFrame({"index": [2, 0, 1], "label": [0, 0, 0]})
    assert match_rows(frame, "t.csv", 3).tolist() == [1, 2, 0]
    by_path = pd.DataFrame({"path": ["c", "a", "b"], "label": [0, 0, 0]})
    assert match_rows(by_path, "t.csv", 3, ["a", "b", "c"]).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match=r"t.csv' has no row for 2 of 5 .* the first is index 3"):
        match_rows(frame, "t.csv", 5)
    with pytest.raises(ValueError, match=r"t.csv', column 'index', row 0: 2; the training set has 2 samples"):
        match_rows(frame, "t.csv", 2)
    with pytest.raises(ValueError, match=r"column 'path', row 0: 'c'; no such path .* first is 'a'"):
        match_rows(by_path, "t.csv", 2, ["a", "b"])
    with pytest.raises(ValueError, match=r"'b' is the path of the samples 1 and 3; give a column 'index'"):
        match_rows(by_path, "t.csv", 4, ["a", "b", "c", "b"])
    with pytest.raises(ValueError, match="this dataset has no paths"):
        match_rows(by_path, "t.csv", 3)


def test_the_path_says_which_sample_is_meant_where_positions_have_moved():
    frame = pd.DataFrame({"index": [0, 1, 2], "path": ["a", "b", "c"], "label": [0, 0, 0]})
    assert match_rows(frame, "t.csv", 3, ["b", "c", "a"]).tolist() == [1, 2, 0]
    assert match_rows(frame, "t.csv", 3).tolist() == [0, 1, 2]  # the set has no names
    moved = r"column 'path', row 1: 'b'; no such path .* correct it, or remove the column if .* 'index' hold"
    with pytest.raises(ValueError, match=moved):
        match_rows(frame, "t.csv", 3, ["a", "x", "c"])
    # an image that is not there needs no row
    assert match_rows(frame, "t.csv", 4, ["a", "x", "b", "c"], absent=[1]).tolist() == [0, -1, 1, 2]
    with pytest.raises(ValueError, match=r"no row for 1 of 4 .* the first is index 1"):
        match_rows(frame, "t.csv", 4, ["a", "x", "b", "c"], absent=[2])
