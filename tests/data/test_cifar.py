import pickle

import numpy as np
import pytest
import torch

from lightning_nrml.data import CIFARDataModule, CIFARNDataModule, NoiseConfig


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def dump(path, content):
    path.write_bytes(pickle.dumps(content))


@pytest.fixture
def torchvision_folders(tmp_path):
    ten = tmp_path / "cifar-10-batches-py"
    ten.mkdir()
    for i in range(1, 6):
        dump(ten / f"data_batch_{i}", {"data": pixels(4, i).reshape(4, -1), "labels": [0, 1, 2, i % 3]})
    dump(ten / "test_batch", {"data": pixels(3, 9).reshape(3, -1), "labels": [2, 1, 0]})
    dump(ten / "batches.meta", {"label_names": ["plane", "car", "bird"]})
    hundred = tmp_path / "cifar-100-python"
    hundred.mkdir()
    for name in ("train", "test"):
        dump(hundred / name, {"data": pixels(4).reshape(4, -1), "fine_labels": [1, 0, 1, 0]})
    dump(hundred / "meta", {"fine_label_names": ["apple", "fish"]})
    return tmp_path


def test_the_official_pickles_are_read_from_either_folder(torchvision_folders):
    for path in (torchvision_folders, torchvision_folders / "cifar-10-batches-py"):
        dm = CIFARDataModule(str(path))
        assert (dm.num_classes, dm.num_train_samples, dm.in_channels) == (3, 20, 3)
        assert dm.class_names == ["plane", "car", "bird"]
        assert dm.train_label[:8].tolist() == [0, 1, 2, 1, 0, 1, 2, 2]
        assert np.array_equal(dm.splits.train.images.get([4])[0], pixels(4, 2)[0])
        assert dm.splits.test.label.tolist() == [2, 1, 0]
    assert CIFARDataModule(str(torchvision_folders), classes=100).class_names == ["apple", "fish"]


def test_absent_files_say_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is downloaded for you"):
        CIFARDataModule(str(tmp_path)).num_classes
    with pytest.raises(FileNotFoundError, match="UCSC-REAL/cifar-10-100n"):
        CIFARNDataModule(str(tmp_path / "x.npz")).num_classes
    with pytest.raises(ValueError, match="classes must be 10 or 100"):
        CIFARDataModule(str(tmp_path), classes=20)
    with pytest.raises(ValueError, match="label must be one of clean, aggre, worse, random1"):
        CIFARNDataModule("x.npz", label="bad")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("batches.meta", b"x"),
        ("data_batch_3", pickle.dumps({"data": np.zeros((1, 3072), np.uint8)})[:-9]),
        ("data_batch_3", pickle.dumps({"data": np.zeros((1, 3072), np.uint8)})),
        ("data_batch_3", pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [0, 1]})),
        ("data_batch_3", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]})),
        ("test_batch", pickle.dumps([1, 2])),
    ],
)
def test_a_damaged_file_is_named(torchvision_folders, file, content):
    (torchvision_folders / "cifar-10-batches-py" / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is damaged or no file of CIFAR's .*; unpack"):
        CIFARDataModule(str(torchvision_folders)).num_classes


def test_human_labels_train_and_true_ones_are_for_measurement(tmp_path):
    images = pixels(6).transpose(0, 2, 3, 1)
    clean, worse = np.asarray([0, 1, 2, 0, 1, 2]), np.asarray([0, 1, 1, 0, 1, 0])
    path = str(tmp_path / "n.npz")
    np.savez(
        path,
        train_image=images,
        clean_label=clean,
        worse_label=worse,
        random_label2=clean[::-1],
        test_image=images[:3],
        test_label=clean[:3],
        class_names=["a", "b", "c"],
    )
    dm = CIFARNDataModule(path)
    assert (dm.train_label.tolist(), dm.train_clean_label.tolist()) == (worse.tolist(), clean.tolist())
    assert dm.noise_summary["kind"] == "given"
    assert dm.num_classes == 3
    assert CIFARNDataModule(path, label="random2").train_label.tolist() == clean[::-1].tolist()
    with pytest.raises(ValueError, match="noisy already"):
        CIFARNDataModule(path, noise=NoiseConfig("symmetric", 0.2)).num_classes
    noisy = CIFARNDataModule(path, label="clean", noise=NoiseConfig("pair_flip", 1.0))
    assert noisy.train_label.tolist() == ((clean + 1) % 3).tolist()
    plain = CIFARDataModule(path)
    assert plain.train_label.tolist() == clean.tolist()
    assert torch.equal(plain.splits.train.images.get([5])[0], torch.from_numpy(pixels(6)[5]))


@pytest.mark.parametrize(("label", "rate"), [("aggre", 0.0901), ("worse", 0.4021), ("random2", 0.1812)])
def test_the_real_labels_have_the_published_noise(shared_data, label, rate):
    dm = CIFARNDataModule(str(shared_data("cifar10n") / "cifar10n_jpeg.npz"), label=label, cache=False)
    assert (dm.num_train_samples, len(dm.splits.test), dm.num_classes) == (50000, 10000, 10)
    assert dm.noise_summary["rate_realised"] == pytest.approx(rate, abs=1e-4)
    batch = next(iter(dm.train_dataloader()))
    assert batch["image"].shape == (64, 3, 32, 32)
    assert torch.equal(batch["clean_label"], dm.train_clean_label[batch["index"]])
