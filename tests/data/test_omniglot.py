import numpy as np
import pytest
import torch

from lightning_nrml.data import OmniglotDataModule
from lightning_nrml.data.omniglot import unpack


def pack(ink):
    return np.packbits(ink.reshape(len(ink), -1), axis=1)


@pytest.fixture
def small(tmp_path):
    rng = np.random.default_rng(0)
    ink = rng.integers(0, 2, (12, 105, 105), dtype=np.uint8)
    label = np.repeat([3, 4, 8, 9], 3)
    np.savez(tmp_path / "o.npz", bits=pack(ink), label=label, background=label < 5)
    return tmp_path / "o.npz", ink


def test_unpacking_returns_the_ink_and_pooling_its_share(small):
    _, ink = small
    assert torch.equal(unpack(pack(ink), 105, rows=5)[:, 0], torch.from_numpy(ink * 255))
    pooled = unpack(pack(ink), 35)[:, 0].numpy()  # blocks of 3 x 3
    share = ink.reshape(12, 35, 3, 35, 3).mean((2, 4))
    assert np.abs(pooled - share * 255).max() <= 0.5 + 1e-3


def test_background_trains_and_the_other_alphabets_are_tested(small):
    path, _ = small
    dm = OmniglotDataModule(str(path), image_size=21)
    assert (dm.num_classes, dm.num_train_samples, dm.in_channels) == (2, 6, 1)
    assert dm.train_label.tolist() == [0, 0, 0, 1, 1, 1]
    assert dm.splits.test.label.tolist() == [8, 8, 8, 9, 9, 9]
    assert dm.splits.zero_shot
    assert dm.default_train_view()(dm.splits.train.images.get([0, 1]))[0].shape == (2, 1, 21, 21)


def test_sizes_above_the_stored_one_and_absent_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="image_size must be 1 to 105"):
        OmniglotDataModule("x.npz", image_size=128)
    with pytest.raises(FileNotFoundError, match="brendenlake/omniglot"):
        OmniglotDataModule(str(tmp_path / "x.npz")).num_classes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": np.zeros((4, 100), np.uint8)}, r"bits must be \(N, 1379\) uint8.*got \(4, 100\) uint8"),
        ({"bits": np.zeros((4, 1379), np.float32)}, r"got \(4, 1379\) float32"),
        ({"background": np.ones(3, bool)}, "4 labels but 3 entries of background"),
        ({"label": np.arange(3)}, "3 labels but 4 entries of background"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, changes, message):
    arrays = {
        "bits": np.zeros((4, 1379), np.uint8),
        "label": np.arange(4),
        "background": np.asarray([True, True, False, False]),
    }
    np.savez(tmp_path / "o.npz", **(arrays | changes))
    with pytest.raises(ValueError, match=rf"o\.npz.*{message}"):
        OmniglotDataModule(str(tmp_path / "o.npz")).num_classes


def test_the_real_set_and_its_noise_list(shared_data):
    folder = shared_data("omniglot")
    dm = OmniglotDataModule(
        str(folder / "omniglot.npz"),
        noise_list="noise_lists.npz:given_r0.5_s0",
        batch_size=128,
        m_per_class=8,
    )
    assert (dm.num_classes, dm.num_train_samples, len(dm.splits.test)) == (964, 19280, 13180)
    assert len(np.unique(dm.splits.test.label)) == 659
    assert np.array_equal(dm.train_label, np.load(folder / "noise_lists.npz")["given_r0.5_s0"])
    assert dm.noise_summary["rate_realised"] == pytest.approx(0.4956, abs=1e-4)
    assert len(dm.train_dataloader()) == 150  # 600 iterations are 4 epochs
    batch = dm.on_after_batch_transfer(next(iter(dm.test_dataloader())), 0)
    assert batch["image"].shape == (256, 1, 28, 28)
    ink = batch["image"] * 0.225 + 0.078
    assert -1e-6 <= float(ink.min()) < float(ink.max()) <= 1 + 1e-6
