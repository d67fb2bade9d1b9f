import numpy as np
import pytest
import torch

from lightning_nrml.data.noise import small_cluster
from lightning_nrml.data.sources import MemorySource
from lightning_nrml.data.splits import (
    Split,
    Splits,
    check_labels,
    check_splits,
    join_splits,
    put_noise,
    split_by_rows,
    warn_of_single_samples,
)


def source(n):
    return MemorySource(torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1))


def split(label, **more):
    return Split(source(len(label)), np.asarray(label), **more)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0, 1, 3], r"label 3 at row 2 .*integers from 0 to 2"),
        ([0, -1, 2], r"label -1 at row 1"),
        ([0.0, 1.0, float("nan")], r"label nan at row 2"),
        ([0.5, 1.0, 2.0], r"label 0\.5 at row 0"),
        ([[0, 2], [1, 0]], r"label 2 at row 0 .*integers from 0 to 1"),
        (["a", "b", "c"], r"must be integers"),
    ],
)
def test_bad_labels_are_named_by_row(label, message):
    with pytest.raises(ValueError, match=message):
        check_labels(np.asarray(label), 3, "here")


def test_good_labels_become_int64():
    assert check_labels(np.asarray([0.0, 2.0]), 3, "here").dtype == np.int64
    assert check_labels(np.asarray([[True, False]]), 3, "here").tolist() == [[1, 0]]
    assert check_labels(np.asarray([7]), None, "here").tolist() == [7]


def test_seen_classes_are_numbered_alike_and_names_follow():
    names = list("abcdefgh")
    splits = join_splits({"train": split([7, 3, 7, 5]), "test": split([5, 3])}, names)
    assert splits.train.label.tolist() == [2, 0, 2, 1]
    assert splits.test.label.tolist() == [1, 0]
    assert (splits.num_classes, splits.class_names, splits.zero_shot) == (3, ["d", "f", "h"], False)


def test_unseen_classes_make_the_split_zero_shot_and_keep_their_labels():
    splits = join_splits({"train": split([4, 1]), "val": split([9]), "test": split([8, 6, 8])})
    assert splits.train.label.tolist() == [1, 0]
    assert splits.val.label.tolist() == [9]
    assert splits.test.label.tolist() == [8, 6, 8]
    assert splits.zero_shot


@pytest.mark.parametrize("other", [{"test": [0, 5]}, {"val": [5], "test": [0]}, {"val": [1], "test": [7]}])
def test_partly_seen_classes_are_refused_with_their_names(other):
    parts = {"train": split([0, 1])} | {name: split(label) for name, label in other.items()}
    with pytest.raises(ValueError, match=r"classes do not occur in train \((c5|c7)\)"):
        join_splits(parts, [f"c{i}" for i in range(8)])


def test_a_true_class_that_no_given_label_names_still_is_a_class():
    splits = join_splits({"train": split([0, 0, 3], clean_label=np.asarray([0, 1, 3])), "test": split([1])})
    assert splits.num_classes == 3
    assert splits.train.label.tolist() == [0, 0, 2]
    assert splits.train.clean_label.tolist() == [0, 1, 2]
    assert splits.test.label.tolist() == [1]


def test_the_truth_may_be_none_of_the_classes_but_no_label_is():
    splits = join_splits({"train": split([3, 3, 5], clean_label=np.asarray([3, -1, 5])), "test": split([5])})
    check_splits(splits, "here")
    assert (splits.num_classes, splits.train.clean_label.tolist()) == (2, [0, -1, 1])
    for bad in ({"label": [-1, 0]}, {"label": [0, 1], "clean_label": np.asarray([-2, 0])}):
        with pytest.raises(ValueError, match=r"train: label -[12] at row 0"):
            check_splits(Splits(split(**bad), None, 2), "here")
    with pytest.raises(ValueError, match=r"clean labels of train: label -1 at row 0 .* from 0 to 1"):
        check_splits(
            Splits(split(np.eye(2, dtype=int), clean_label=np.asarray([[-1, 0], [0, 1]])), None, 2), "here"
        )


def test_rows_are_cut_with_everything_and_evaluation_uses_clean_labels():
    splits = split_by_rows(
        source(4),
        np.asarray([0, 1, 1, 0]),
        {"train": [2, 0], "test": [1, 3]},
        clean_label=np.asarray([0, 0, 1, 1]),
        paths=list("wxyz"),
    )
    assert splits.train.images.get([0, 1]).flatten().tolist() == [2, 0]
    assert (splits.train.label.tolist(), splits.train.clean_label.tolist()) == ([1, 0], [1, 0])
    assert (splits.test.label.tolist(), splits.test.clean_label) == ([0, 1], None)
    assert (splits.train.paths, splits.test.paths) == (["y", "w"], ["x", "z"])


def test_empty_splits_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="the test split is empty"):
        split_by_rows(source(2), np.asarray([0, 1]), {"train": [0, 1], "test": []})
    with pytest.raises(ValueError, match="train has 3 images but 2 labels"):
        check_splits(Splits(Split(source(3), np.asarray([0, 1])), None, 2), "here")
    with pytest.raises(ValueError, match="here, train: label 2 at row 1"):
        check_splits(Splits(split([0, 2]), None, 2), "here")


def test_splits_of_other_channels_or_kind_are_refused():
    grey = {"train": split([0, 1]), "val": split([1, 0])}
    pixels = torch.zeros(2, 5, 1, 1, dtype=torch.uint8)
    for images, words in {
        pixels: r"train images have 1 channel\(s\) of uint8 \(image 0\).*test images 5 of uint8 \(image 0\)",
        pixels[:, :1].float(): r"but the test images 1 of float32 .*same kind",
    }.items():
        splits = Splits(grey["train"], Split(MemorySource(images), np.asarray([0, 1])), 2, grey["val"])
        with pytest.raises(ValueError, match=words):
            check_splits(splits, "here")


def test_unequal_numbers_of_clean_labels_are_refused():
    train = split([0, 1, 1], clean_label=np.asarray([0, 1]))
    for check in (
        lambda: join_splits({"train": train}),
        lambda: check_splits(Splits(train, None, 2), "here"),
    ):
        with pytest.raises(ValueError, match="train has 3 labels but 2 clean labels"):
            check()


@pytest.mark.parametrize("zero_shot", [True, False])
def test_dissolved_classes_leave_names_and_seen_evaluation_rows(zero_shot):
    label = np.repeat(np.arange(4), 6)
    noisy = small_cluster(label, np.random.default_rng(0).normal(size=(24, 3)), 0.5, seed=1)
    left = noisy.class_id
    test = split(np.arange(4), paths=list("wxyz"))
    splits = Splits(split(label), test, 4, class_names=list("abcd"), zero_shot=zero_shot)
    put_noise(splits, noisy)
    assert splits.num_classes == 2
    assert splits.class_names == ["abcd"[i] for i in left]
    assert np.array_equal(splits.train.label != splits.train.clean_label, noisy.is_noise)
    assert set(splits.train.clean_label[noisy.is_noise]) == {-1}
    if zero_shot:
        assert splits.test.label.tolist() == [0, 1, 2, 3]
    else:
        assert splits.test.label.tolist() == [0, 1]
        assert splits.test.paths == ["wxyz"[i] for i in left]


@pytest.mark.parametrize("name", ["val", "test"])
def test_noise_must_leave_something_to_evaluate_on(name):
    label = np.repeat(np.arange(4), 6)
    noisy = small_cluster(label, np.random.default_rng(0).normal(size=(24, 3)), 0.5, seed=1)
    parts = {"val": split([noisy.class_id[0]]), "test": split([noisy.class_id[1]])}
    gone = np.setdiff1d(np.arange(4), noisy.class_id)
    parts[name] = split(gone)
    with pytest.raises(ValueError, match=f"all classes of the {name} split.*lower noise.rate"):
        put_noise(Splits(split(label), num_classes=4, **parts), noisy)


def test_classes_of_one_sample_are_counted_in_a_warning(recwarn):
    with pytest.warns(UserWarning, match="2 of 3 train classes have one sample only"):
        warn_of_single_samples(np.asarray([0, 1, 1, 2]))
    recwarn.clear()
    warn_of_single_samples(np.asarray([0, 0, 1, 1]))
    assert not recwarn
