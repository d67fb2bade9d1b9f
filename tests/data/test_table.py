import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightning_nrml.data import NoiseConfig, TableDataModule, write_label_table


@pytest.fixture
def images(tmp_path):
    (tmp_path / "img").mkdir()
    for i in range(6):
        Image.fromarray(np.full((4, 4), i, dtype=np.uint8)).save(tmp_path / "img" / f"{i}.png")
    return tmp_path


def frame(**columns):
    base = {"path": [f"img/{i}.png" for i in range(6)], "label": ["cat", "dog", "cat", "NA", "dog", "NA"]}
    return pd.DataFrame(base | columns)


def table(folder, data, suffix="csv", **settings):
    path = folder / f"t.{suffix}"
    data.to_csv(path, index=False) if suffix == "csv" else data.to_parquet(path)
    return TableDataModule(str(path), image_size=4, channels=1, **settings)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_cannot_be_seen_makes_no_other_class(images, suffix):
    """Blanks around a name, and the two encodings of an accent."""
    names = ["h\u00e9ron", "kite", " kite", "he\u0301ron", "kite ", "h\u00e9ron"]
    dm = table(images, frame(label=names, clean_label=["h\u00e9ron ", *["kite"] * 5]), suffix)
    assert dm.class_names == ["h\u00e9ron", "kite"]
    assert dm.train_label.tolist() == [0, 1, 1, 0, 1, 0]
    assert dm.train_clean_label.tolist() == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_names_become_sorted_classes_and_rows_their_images(images, suffix):
    dm = table(images, frame(), suffix)
    assert dm.class_names == ["NA", "cat", "dog"]
    assert dm.train_label.tolist() == [1, 2, 1, 0, 2, 0]
    assert dm.train_paths[2] == "img/2.png"
    assert dm.splits.train.images.get([5]).unique().tolist() == [5]
    assert dm.val_dataloader() == []


def test_splits_and_clean_labels(images):
    data = frame(
        split=["train", "train", "train", "test", "val", "test"],
        label=[10, 30, 10, 30, 30, 10],
        clean_label=[10, 10, 30, 10, 30, 30],
    )
    dm = table(images, data)
    assert dm.class_names == ["10", "30"]
    assert (dm.train_label.tolist(), dm.train_clean_label.tolist()) == ([0, 1, 0], [0, 0, 1])
    # evaluation is against the truth
    assert (dm.splits.val.label.tolist(), dm.splits.test.label.tolist()) == ([1], [0, 1])
    assert dm.noise_summary["rate_realised"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "names",
    [
        ["1.1", "1.10", "2"],  # were 1.1 twice
        ["1e3", "1000", "5"],  # were 1000 twice
        ["12e4", "1e5", "7"],
        ["10000000000000000001", "10000000000000000002", "3"],  # beyond int64
        ["9007199254740993", "9007199254740992", "1.5"],  # beyond a float
        ["inf", "nan", "1"],
        ["0x10", "16", "+16"],
        ["True", "1", "NA"],
    ],
)
def test_labels_that_look_like_numbers_stay_apart_and_keep_their_names(images, names):
    dm = table(images, frame(label=names * 2))
    assert dm.class_names == sorted(names)
    assert [dm.class_names[i] for i in dm.train_label.tolist()] == names * 2


def test_large_ids_equal_their_clean_ones(images):
    """An empty cell of the test rows must not make floats of the column, which would round."""
    ids = [9007199254740993, 9007199254740992] * 3
    split = ["train"] * 4 + ["test"] * 2
    dm = table(images, frame(label=ids, clean_label=[*map(str, ids[:4]), "", ""], split=split))
    assert dm.class_names == ["9007199254740992", "9007199254740993"]
    assert not dm.train_is_noise.any()
    empty = table(images, frame(label=ids, clean_label=[""] * 6))
    assert (empty.num_classes, empty.train_clean_label) == (2, None)


def test_a_plus_sign_makes_no_other_class(images):
    given, clean = ["+1", "-1", "+1", "-1", "+1", "-1"], ["1", "-1", "1.0", "1", "-1", "-1"]
    dm = table(images, frame(label=given, clean_label=clean))
    assert dm.class_names == ["-1", "1"]
    assert dm.train_is_noise.tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("kind", [float, "Int64", object, "category", str])
def test_whole_numbers_are_classes_however_they_are_stored(images, suffix, kind):
    label = pd.Series([2, 10, 2, 10, 2, 10])
    clean = pd.Series([2, 10, 10, 10, 2, 2]).astype(float if kind is str else kind)
    # names, too, though the column of clean labels holds floats
    given = ["2", "10", "2", "10", "2", "x"] if kind is str else label
    dm = table(images, frame(label=given, clean_label=clean), suffix)
    assert dm.class_names == (["10", "2", "x"] if kind is str else ["2", "10"])
    wrong = [False, False, True, False, False, True]
    assert dm.train_is_noise.tolist() == wrong


@pytest.mark.parametrize("unknown", [-1, None])
@pytest.mark.parametrize("names", [[2, 10], ["cat", "dog"]])
def test_a_split_of_unknown_truth_has_its_labels_only(images, unknown, names):
    a, b = names
    given = {"label": [a, b, a, b, a, b], "split": ["train"] * 4 + ["test"] * 2}
    train = table(images, frame(clean_label=[unknown] * 4 + [b, a], **given))
    assert (train.num_classes, train.train_is_noise, train.train_clean_label) == (2, None, None)
    assert train.noise_summary["rate_realised"] is None
    assert train.splits.test.label.tolist() == [1, 0]
    test = table(images, frame(clean_label=[b, b, a, b, unknown, unknown], **given))
    assert test.train_is_noise.tolist() == [True, False, False, False]
    assert test.splits.test.label.tolist() == [0, 1]
    nothing = table(images, frame(clean_label=[unknown] * 6, **given), "parquet")
    assert (nothing.class_names, nothing.train_clean_label) == ([str(a), str(b)], None)
    part = table(images, frame(clean_label=[a, unknown, a, b, a, b], **given))
    with pytest.raises(ValueError, match=r"'clean_label', row 1: unknown .* 1 of 4 train rows"):
        part.num_classes


def test_what_is_marked_wrong_may_be_none_of_the_classes(images):
    wrong = [False] * 4 + [True] * 2
    dm = table(
        images, frame(label=["a", "b"] * 3, clean_label=["a", "b", "a", "b", -1, None], is_noise=wrong)
    )
    assert (dm.class_names, dm.train_clean_label.tolist()) == (["a", "b"], [0, 1, 0, 1, -1, -1])
    assert dm.train_is_noise.tolist() == wrong
    # classes 2 and 5 became 0 and 1, class 3 was dissolved
    clean = [2, 2, 5, 5, 3, -1]
    dm = table(images, frame(label=[0, 0, 1, 1, 0, 1], clean_label=clean, is_noise=wrong))
    assert (dm.class_names, dm.train_clean_label.tolist()) == (["2", "5"], [0, 0, 1, 1, -1, -1])
    with pytest.raises(ValueError, match="'is_noise' contradicts the labels"):
        table(images, frame(label=[0, 0, 1, 1, 0, 1], clean_label=clean, is_noise=[False] * 6)).num_classes


def test_minus_one_is_a_class_if_a_label_says_so(images):
    dm = table(images, frame(label=[-1, 1] * 3, clean_label=[-1, -1, 1, 1, -1, 1]))
    assert (dm.class_names, dm.train_is_noise.tolist()) == (["-1", "1"], [0, 1, 1, 0, 0, 0])


def test_root_and_column_names_can_be_given(images, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tables")
    data = frame().rename(columns={"path": "file", "label": "kind"})
    data["file"] = [f"{i}.png" for i in range(6)]
    dm = table(elsewhere, data, root=str(images / "img"), path_column="file", label_column="kind")
    assert dm.splits.train.images.get([1]).unique().tolist() == [1]


def test_noise_leaves_out_what_the_set_leaves_out(images):
    data, index = frame(keep=[False, True, True, True, True, True]), np.arange(6)
    noisy = table(images, data, noise=NoiseConfig("symmetric", 0.5))
    assert noisy.train_keep.tolist() == [False] + [True] * 5
    noises = {"bare": {}, "own": {"keep": index != 3}, "none": {"keep": index == 0}}
    for name, columns in noises.items():
        write_label_table(images / f"{name}.csv", {"index": index, "label": index % 3, **columns})
    assert table(images, data, noise=images / "bare.csv").train_keep.tolist() == [False] + [True] * 5
    assert table(images, data, noise=images / "own.csv").train_keep.tolist() == [0, 1, 1, 0, 1, 1]
    with pytest.raises(ValueError, match="none is left to train on"):
        table(images, data, noise=images / "none.csv").num_classes


def test_a_table_that_keeps_no_train_row_is_refused(images):
    split = ["train"] * 4 + ["test"] * 2
    data = frame(label=["a", "b"] * 3, split=split, use=[False] * 4 + [True] * 2)
    with pytest.raises(
        ValueError, match=r"t\.csv, column 'use': false in all 4 train rows.*remove the column"
    ):
        table(images, data, keep_column="use").num_classes
    data["use"] = [False] * 3 + [True] + [False] * 2
    assert table(images, data, keep_column="use").train_keep.tolist() == [False, False, False, True]


@pytest.mark.parametrize("column", ["path", "file"])
def test_a_path_of_digits_is_a_name(images, column):
    data = frame(path=[f"{i:03d}" for i in range(6)]).rename(columns={"path": column})
    for i in range(6):
        (images / "img" / f"{i}.png").rename(images / f"{i:03d}")
    dm = table(images, data, path_column=column)
    assert dm.train_paths == ["000", "001", "002", "003", "004", "005"]
    assert dm.splits.train.images.get([4]).unique().tolist() == [4]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (frame().drop(columns="label"), KeyError, "has no column 'label'; its columns are path"),
        (frame(label=["a", None, "b", "a", "b", "a"]), ValueError, "column 'label', row 1: empty"),
        (frame(path=["img/0.png"] * 5 + [None]), ValueError, "column 'path', row 5: empty"),
        (
            frame(split=["train"] * 5 + ["dev"]),
            ValueError,
            "row 5: 'dev'; a split is one of train",
        ),
        (frame(split=["test"] * 6), ValueError, "the train split is empty"),
        (frame(more=0).rename(columns={"more": "label"}), ValueError, "there are 2 columns 'label'; rename"),
        (frame(path=["img/9.png"] * 6), RuntimeError, r"6 of 6 train images are missing.*9\.png"),
    ],
)
def test_what_does_not_fit_is_named(images, data, error, message):
    with pytest.raises(error, match=message):
        table(images, data).num_classes


@pytest.mark.parametrize("again", ["img/0.png", "./img/0.png", "absolute"])
def test_an_image_belongs_to_one_split(images, again):
    name = str(images / "img" / "0.png") if again == "absolute" else again
    paths = [f"img/{i}.png" for i in range(5)] + [name]
    data = frame(path=paths, label=["a", "b"] * 3, split=["train"] * 4 + ["test"] * 2)
    with pytest.raises(
        ValueError, match=r"row 5 \(test\) is that of row 0 \(train\), .*img/0\.png; an image"
    ):
        table(images, data).num_classes


def test_an_image_twice_in_a_split_is_told(images):
    data = frame(path=[f"img/{i % 4}.png" for i in range(6)], label=["a", "b", "a", "b", "a", "a"])
    with pytest.warns(
        UserWarning, match=r"2 rows have the image of an earlier row, 1 .* row 4, .* row 0, .*0\.png"
    ):
        assert table(images, data).num_train_samples == 6
    # a table that names samples cannot tell them apart by path
    names = {"path": data["path"], "index": range(6)}
    write_label_table(images / "noise.csv", {**names, "label": [1, 0] * 3})
    with pytest.warns(UserWarning, match="2 rows have"):
        assert table(images, data, noise=images / "noise.csv").train_label.tolist() == [1, 0] * 3
    pd.DataFrame({"path": data["path"][:4], "label": [0, 1, 0, 1]}).to_csv(images / "noise.csv", index=False)
    with (
        pytest.warns(UserWarning, match="2 rows have"),
        pytest.raises(ValueError, match=r"'img/0\.png' is the path of the samples 0 and 4; give a column"),
    ):
        table(images, data, noise=images / "noise.csv").num_classes


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_labels_of_digits_keep_their_zeros(images, suffix):
    label = ["01", "1", "10", "01", "1", "10"]
    dm = table(images, frame(label=label), suffix)
    assert (dm.class_names, dm.train_label.tolist()) == (["01", "1", "10"], [0, 1, 2] * 2)
    # without them these are numbers, also beside empty cells and blanks
    clean = [" 2", "10", "", " 2", "10", "10"] if suffix == "csv" else [2, 10, None, 2, 10, 10]
    dm = table(
        images,
        frame(label=[2, 10] * 3, clean_label=clean, split=["train"] * 2 + ["test"] + ["val"] * 3),
        suffix,
    )
    assert dm.class_names == ["2", "10"]
    assert dm.train_clean_label.tolist() == [0, 1]


def test_absent_foreign_and_broken_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="TableDataModule reads"):
        TableDataModule(str(tmp_path / "x.csv")).num_classes
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be \.csv or \.parquet"):
        TableDataModule(str(tmp_path / "x.json")).num_classes
    (tmp_path / "x.parquet").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        TableDataModule(str(tmp_path / "x.parquet")).num_classes


def test_blanks_after_the_commas_of_a_csv(images):
    lines = ["path, label, split", *(f'img/{i}.png, "k, {i % 2}", train' for i in range(6))]
    (images / "t.csv").write_text("\n".join(lines) + "\n")
    dm = TableDataModule(str(images / "t.csv"), image_size=4, channels=1)
    assert dm.class_names == ["k, 0", "k, 1"]
    assert dm.train_label.tolist() == [0, 1] * 3
    (images / "noisy.csv").write_text("index, label\n" + "".join(f"{i}, 1\n" for i in range(6)))
    noisy = TableDataModule(str(images / "t.csv"), image_size=4, channels=1, noise=str(images / "noisy.csv"))
    assert noisy.train_label.tolist() == [1] * 6


def test_names_as_bytes_in_parquet(images):
    names = ["h\u00e9ron".encode(), b"kite"] * 3
    paths = [f"img/{i}.png".encode() for i in range(6)]
    dm = table(images, frame(label=names, path=paths), "parquet")
    assert dm.class_names == ["h\u00e9ron", "kite"]
    assert dm.splits.train.images.get([3]).unique().tolist() == [3]
