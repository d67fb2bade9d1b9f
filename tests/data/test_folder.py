import os

import numpy as np
import pytest
from PIL import Image

from lightning_nrml.data import FolderDataModule, NoiseConfig


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), value, dtype=np.uint8)).save(path)


def fill(root, classes, n=4):
    for c in classes:
        for i in range(n):
            save(root / c / f"{i}.png", i)


def folder(root, **settings):
    return FolderDataModule(str(root), image_size=4, **settings)


def test_a_single_folder_is_divided_by_class(tmp_path):
    fill(tmp_path, "dabce")
    (tmp_path / "readme.txt").write_text("not an image")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    save(tmp_path / "b" / "deep" / "x.JPG")
    dm = folder(tmp_path, train_fraction=0.4)
    assert dm.class_names == ["a", "b"]
    assert dm.train_label.tolist() == [0] * 4 + [1] * 5
    assert dm.train_paths[-1] == "b/deep/x.JPG"
    assert dm.splits.test.label.tolist() == [2] * 4 + [3] * 4 + [4] * 4
    assert dm.splits.train.images.get([3]).unique().tolist() == [3]
    assert dm.splits.train.images.get([3]).shape == (1, 3, 4, 4)


def test_a_single_folder_is_divided_by_image_within_every_class(tmp_path):
    fill(tmp_path, "abc", 10)
    dm = folder(tmp_path, split="images", train_fraction=0.7)
    assert np.bincount(dm.train_label).tolist() == [7, 7, 7]
    assert np.bincount(dm.splits.test.label).tolist() == [3, 3, 3]
    assert not set(dm.train_paths) & set(dm.splits.test.paths)
    assert folder(tmp_path, split="images", train_fraction=0.7).train_paths == dm.train_paths
    assert folder(tmp_path, split="images", train_fraction=0.7, split_seed=1).train_paths != dm.train_paths


def test_split_folders_share_one_numbering(tmp_path):
    fill(tmp_path / "train", "abc")
    fill(tmp_path / "val", "ac", 1)
    fill(tmp_path / "test", "cb", 2)
    dm = folder(tmp_path)
    assert (dm.num_classes, dm.class_names) == (3, ["a", "b", "c"])
    assert dm.splits.val.label.tolist() == [0, 2]
    assert dm.splits.test.label.tolist() == [1, 1, 2, 2]
    assert dm.splits.test.paths[0] == "test/b/0.png"


def test_split_folders_of_other_classes_are_zero_shot_and_mixed_ones_refused(tmp_path):
    fill(tmp_path / "train", "bd")
    fill(tmp_path / "test", "ac")
    splits = folder(tmp_path).splits
    assert splits.zero_shot
    assert (splits.class_names, splits.train.label.max()) == (["b", "d"], 1)
    assert splits.test.label.tolist() == [0] * 4 + [2] * 4
    fill(tmp_path / "test", "b")
    with pytest.raises(ValueError, match=r"2 of 3 test classes do not occur in train \(a, c\)"):
        folder(tmp_path).num_classes


def test_names_that_start_with_a_dot_are_no_images(tmp_path):
    fill(tmp_path, "ab")
    for name in ("._0.png", ".hidden.jpg"):
        (tmp_path / "a" / name).write_bytes(b"resource fork")
    for name in (".ipynb_checkpoints", "sub/.thumbnails"):  # copies, which would leak into the other split
        fill(tmp_path / "a", [name])
    splits = folder(tmp_path, split="images").splits
    assert not [path for part in (splits.train, splits.test) for path in part.paths if "/." in path]
    assert len(splits.train) + len(splits.test) == 8


@pytest.mark.parametrize("names", [["Test", "Train"], ["testing", "training"], ["test", "valid"]])
def test_splits_of_other_names_are_no_classes(tmp_path, names):
    """They were: ``Test`` trained, and ``Train`` was the unseen class."""
    for name in names:
        fill(tmp_path / name, "ab")
    with pytest.raises(ValueError, match=rf"the folders {', '.join(names)}: if these are splits"):
        folder(tmp_path).num_classes


def test_what_is_not_read_beside_the_splits_is_told(tmp_path):
    fill(tmp_path / "train", "ab")
    fill(tmp_path / "valid", "ab")
    (tmp_path / ".cache").mkdir()
    with pytest.warns(UserWarning, match="train, val, test are read, and not valid; rename these if"):
        assert folder(tmp_path).num_train_samples == 8


def test_a_file_name_in_another_encoding_is_refused_before_training(tmp_path):
    """The ledger could not be written, hours later."""
    fill(tmp_path / "train", "ab")
    file = tmp_path / "train" / "a" / "0.png"
    try:
        file.rename(file.with_name(os.fsdecode(b"caf\xe9.png")))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with pytest.raises(ValueError, match=r"the train image 'train/a/caf.udce9\.png' is not in UTF-8.*rename"):
        folder(tmp_path).num_classes


def test_images_without_labels(tmp_path):
    fill(tmp_path / "train", ["all"])
    data = folder(tmp_path, batch_size=2)
    assert (data.num_classes, data.num_train_samples, data.splits.test) == (1, 4, None)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        folder(tmp_path / "nowhere").num_classes
    with pytest.raises(
        ValueError, match=r"has no class folders with images.*or <root>/train/all/<image> for"
    ):
        folder(tmp_path).num_classes
    fill(tmp_path, "a")
    with pytest.raises(ValueError, match="at least 2 class folders"):
        folder(tmp_path).num_classes
    fill(tmp_path, "b")
    (tmp_path / "c").mkdir()
    with pytest.warns(UserWarning, match=r"1 folders of .* have no images, such as c"):
        assert folder(tmp_path).class_names == ["a"]
    with pytest.raises(ValueError, match="train_fraction must lie inside"):
        folder(tmp_path, train_fraction=1.0)
    with pytest.raises(ValueError, match="split must be 'classes' or 'images'"):
        folder(tmp_path, split="half")


def test_eurosat_runs_from_its_official_layout(shared_data):
    dm = FolderDataModule(str(shared_data("eurosat_rgb_subset") / "2750"), image_size=32, cache=False)
    assert (dm.num_classes, dm.num_train_samples, len(dm.splits.test)) == (5, 1000, 1000)
    assert dm.class_names == ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
    assert next(iter(dm.train_dataloader()))["image"].shape == (64, 3, 32, 32)


def test_asymmetric_noise_by_the_names_of_folders(tmp_path):
    fill(tmp_path / "train", ("heron", "kite"), 2)
    fill(tmp_path / "test", ("heron", "kite"), 1)
    dm = folder(tmp_path, noise=NoiseConfig("asymmetric", 1.0, mapping={"heron": "kite"}))
    assert dm.train_label.tolist() == [1, 1, 1, 1]
