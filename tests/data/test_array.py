import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_nrml.data import ArrayDataModule

LABEL = np.asarray([5, 5, 2, 2, 7, 7, 9, 9])
TRAIN = np.asarray([1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)


@pytest.fixture
def save(tmp_path):
    def write(name="d.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    return write


def encoded():
    files = []
    for pixels in IMAGES:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        files.append(stream.getvalue())
    return {
        "jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
    }


@pytest.mark.parametrize("kind", ["image", "images", "grey", "float", "encoded"])
def test_every_kind_of_image_array_gives_the_same_pixels(save, kind):
    arrays = {
        "image": {"image": IMAGES},
        "images": {"images": IMAGES},
        "grey": {"image": IMAGES[..., 0]},
        "float": {"image": IMAGES / np.float32(255)},
        "encoded": encoded(),
    }[kind]
    dm = ArrayDataModule(save(label=LABEL, train_class=TRAIN, **arrays))
    expected = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    expected = expected[:, :1] if kind == "grey" else expected
    assert dm.in_channels == expected.shape[1]
    assert torch.equal(dm.splits.train.images.get(range(4)), expected[:4])
    assert torch.equal(dm.splits.test.images.get([3]), expected[7:])
    assert dm.train_label.tolist() == [1, 1, 0, 0]
    assert dm.splits.zero_shot
    assert dm.splits.test.label.tolist() == [7, 7, 9, 9]


def test_split_codes_names_and_separate_arrays_mean_the_same(save):
    rows = np.asarray([0, 2, 0, 1, 0, 2, 0, 1])
    label = np.asarray([0, 0, 1, 1, 0, 0, 1, 1])
    named = np.asarray(["train", "val", "test"])[rows]
    paths = [
        (save("a.npz", image=IMAGES, label=label, split=rows), {"split_key": "split"}),
        (save("b.npz", image=IMAGES, label=label, split=named), {"split_key": "split"}),
    ]
    parts = {}
    for code, name in enumerate(("train", "val", "test")):
        parts |= {f"{name}_image": IMAGES[rows == code], f"{name}_label": label[rows == code]}
    paths.append((save("c.npz", **parts), {}))
    for path, settings in paths:
        splits = ArrayDataModule(path, **settings).splits
        for code, part in enumerate((splits.train, splits.val, splits.test)):
            assert part.label.tolist() == label[rows == code].tolist()
            pixels = part.images.get(range(len(part))).permute(0, 2, 3, 1).numpy()
            assert np.array_equal(pixels, IMAGES[rows == code])
        assert not splits.zero_shot


def test_subset_restricts_evaluation_and_train_on_request(save):
    chosen = np.asarray([1, 0, 1, 1, 0, 1, 1, 1], dtype=bool)
    path = save(image=IMAGES, label=LABEL, train_class=TRAIN, some=chosen)
    splits = ArrayDataModule(path, subset="some").splits
    assert (len(splits.train), splits.test.label.tolist()) == (4, [7, 9, 9])
    assert len(ArrayDataModule(path, subset="some", subset_train=True).splits.train) == 3


def test_resizing_is_antialiased_bilinear(save):
    path = save(image=IMAGES, label=LABEL, train_class=TRAIN)
    small = ArrayDataModule(path, image_size=3).splits.train.images.get([0])[0]
    expected = np.asarray(Image.fromarray(IMAGES[0]).resize((3, 3), Image.Resampling.BILINEAR))
    assert np.abs(small.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max() <= 1


def test_noisy_labels_come_from_a_second_array_or_from_a_list_beside_the_file(save):
    clean = np.asarray([0, 0, 1, 1])
    path = save(image=IMAGES, label=LABEL, train_class=TRAIN, true=np.asarray([5, 2, 2, 2, 7, 7, 9, 9]))
    dm = ArrayDataModule(path, clean_label_key="true")
    assert (dm.train_label.tolist(), dm.train_clean_label.tolist()) == ([1, 1, 0, 0], [1, 0, 0, 0])
    unknown = save(
        "unknown.npz", image=IMAGES, label=LABEL, train_class=TRAIN, true=[5, 2, -1, 2, 7, 7, 9, 9]
    )
    with pytest.raises(ValueError, match="true: label -1 at row 2"):  # which might mean unknown
        ArrayDataModule(unknown, clean_label_key="true").num_classes
    save("lists.npz", clean_label=1 - clean, given=[0, 1, 0, 1], short=[0, 1], far=[0, 0, 0, 2])
    dm = ArrayDataModule(path, noise_list="lists.npz:given")
    assert (dm.train_label.tolist(), dm.train_clean_label.tolist()) == ([0, 1, 0, 1], [1, 1, 0, 0])
    assert dm.train_is_noise.tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match=r"short of .* has 2 labels but the train split has 4"):
        ArrayDataModule(path, noise_list="lists.npz:short").num_classes
    with pytest.raises(ValueError, match="label 2 at row 3"):
        ArrayDataModule(path, noise_list="lists.npz:far").num_classes
    with pytest.raises(KeyError, match="has no array 'other'; it has clean_label, far, given, short"):
        ArrayDataModule(path, noise_list="lists.npz:other").num_classes
    with pytest.raises(ValueError, match=r"must be 'file.npz:array'"):
        ArrayDataModule(path, noise_list="given").num_classes
    with pytest.raises(ValueError, match="give one"):
        ArrayDataModule(path, noise_list="lists.npz:given", clean_label_key="true").num_classes
    save("foreign.npz", clean_label=clean, given=clean)
    with pytest.raises(ValueError, match="differs from the train labels"):
        ArrayDataModule(path, noise_list="foreign.npz:given").num_classes


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        ({}, {"label_key": "y"}, KeyError, "has no array 'y'; it has image, label, train_class"),
        ({}, {"split_key": "fold"}, KeyError, "has no array 'fold'"),
        ({"image": IMAGES[:7]}, {}, ValueError, "has 7 images but 8 labels"),
        ({"label": np.asarray([5.0, np.nan] * 4)}, {}, ValueError, "label nan at row 1"),
        ({"label": LABEL[:, None]}, {}, ValueError, r"but these have \(4, 1\); take label\[:, 0\]"),
        ({"label": np.eye(8, dtype=int)}, {}, ValueError, r"\(4, 8\);.*label.argmax\(1\) of one-hot"),
        ({"label": LABEL.astype(object)}, {}, ValueError, r"array 'label' of .*d\.npz.*astype\(str\)"),
        (
            {"image": None, **encoded(), "offsets": np.arange(9.0)},
            {},
            ValueError,
            r"d\.npz must be whole numbers .* got float64",
        ),
        (
            {"image": None, **encoded(), "offsets": np.asarray([9, 5, *range(10, 17)], np.uint64)},
            {},
            ValueError,
            r"offsets of .*d\.npz must rise",
        ),
        ({"train_class": np.ones(8, dtype=bool)}, {}, ValueError, "the test split is empty"),
        ({"train_class": np.full(8, 5)}, {}, ValueError, "row 0: .*5.*; a split is one of 0, 1, 2"),
        ({"train_class": TRAIN[:3]}, {}, ValueError, r"must have shape \(8,\)"),
        ({"image": IMAGES.astype(np.int32)}, {}, ValueError, "must be uint8, or floating within 0 to 1"),
        ({"image": IMAGES.astype(float)}, {}, ValueError, "finite and within 0 to 1"),
        ({"class_names": np.asarray(["a", "b"])}, {}, ValueError, "integers from 0 to 1"),
        ({}, {"subset": "train_class"}, ValueError, "the test split is empty"),
        ({"some": LABEL}, {"subset": "some"}, ValueError, r"must be bool of shape \(8,\)"),
    ],
)
def test_what_does_not_fit_is_named(save, change, settings, error, message):
    arrays = {"image": IMAGES, "label": LABEL, "train_class": TRAIN} | change
    path = save(**{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(error, match=message):
        ArrayDataModule(path, **settings).num_classes


def test_ones_and_zeros_that_may_mean_train_and_test_are_told(save):
    """As codes of splits 0 trains; a bool array that became integers on its way has 1 there."""
    path = save(image=IMAGES, label=LABEL, train_class=TRAIN.astype(np.uint8))
    with pytest.warns(UserWarning, match=r"train_class of .* 0 is read as train and 1 as val; if 1 means tr"):
        assert ArrayDataModule(path).train_label.tolist() == [0, 0, 1, 1]


def test_absent_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.npz; ArrayDataModule reads"):
        ArrayDataModule(str(tmp_path / "x.npz")).num_classes
    (tmp_path / "y.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"y\.npz is no readable npz"):
        ArrayDataModule(str(tmp_path / "y.npz")).num_classes
    np.savez(tmp_path / "d.npz", image=IMAGES, label=LABEL, train_class=TRAIN)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[300] ^= 255
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"array 'image' of .*d\.npz is damaged"):
        ArrayDataModule(str(tmp_path / "d.npz")).num_classes
    np.save(tmp_path / "z.npy", IMAGES)
    with pytest.raises(ValueError, match="holds a single array"):
        ArrayDataModule(str(tmp_path / "z.npy")).num_classes


def test_caltech_as_in_the_accuracy_protocol(shared_data):
    path = str(shared_data("caltech101_dml") / "caltech101_dml_96.npz")
    dm = ArrayDataModule(
        path,
        image_size=48,
        subset="balanced60",
        noise_list="noise_lists.npz:given_r0.5_s0",
        m_per_class=8,
        cache=False,
    )
    assert (dm.num_train_samples, dm.num_classes, dm.in_channels, len(dm.splits.test)) == (3921, 50, 3, 2511)
    assert (dm.class_names[0], dm.class_names[-1]) == ("accordion", "joshua_tree")
    lists = np.load(shared_data("caltech101_dml") / "noise_lists.npz")
    assert np.array_equal(dm.train_label, lists["given_r0.5_s0"])
    assert np.array_equal(dm.train_clean_label, lists["clean_label"])
    assert dm.splits.test.label.min() == 50
    assert len(np.unique(dm.splits.test.label)) == 49
    batch = next(iter(dm.train_dataloader()))
    assert batch["image"].shape == (64, 3, 48, 48)
    assert torch.unique(batch["label"], return_counts=True)[1].tolist() == [8] * 8


@pytest.mark.parametrize("shape", [(8, 3, 6, 6), (8, 3, 6, 9), (8, 1, 8, 8), (8, 10, 32, 32)])
def test_channels_first_is_refused_and_how_to_turn_it_said(save, shape):
    images = np.zeros(shape, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"looks like \(N, C, H, W\).*numpy\.moveaxis\(images, 1, -1\)"):
        ArrayDataModule(save(label=LABEL, train_class=TRAIN, image=images)).num_classes
    dm = ArrayDataModule(save(label=LABEL, train_class=TRAIN, image=np.moveaxis(images, 1, -1)))
    assert (dm.in_channels, dm.splits.train.images.size) == (shape[1], shape[2:])


@pytest.mark.parametrize("shape", [(8, 6, 6, 3), (8, 3, 6, 3), (8, 2, 3, 3), (8, 3, 3, 200), (8, 64, 64, 10)])
def test_channels_last_of_any_number_are_taken(save, shape):
    images = np.zeros(shape, dtype=np.uint8)
    dm = ArrayDataModule(save(label=LABEL, train_class=TRAIN, image=images))
    assert (dm.in_channels, dm.splits.train.images.size) == (shape[3], shape[1:3])
