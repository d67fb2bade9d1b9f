import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_nrml.data import DigitsDataModule, NoiseConfig


def test_the_split_is_fixed_and_stratified_and_pixels_span_the_byte():
    dm = DigitsDataModule()
    splits = dm.splits
    assert (dm.num_classes, dm.in_channels, dm.num_train_samples, len(splits.test)) == (10, 1, 1297, 500)
    for split in (splits.train, splits.test):
        share = np.bincount(split.label) / len(split)
        assert np.abs(share - np.bincount(load_digits().target) / 1797).max() < 1e-3
    # every image of scikit-learn occurs exactly once over both splits, scaled by 255 / 16
    ours = torch.cat([s.images.get(range(len(s))) for s in (splits.train, splits.test)]).flatten(1)
    theirs = np.rint(load_digits().images.reshape(1797, 64) * 255 / 16).astype(np.uint8)
    assert ours.dtype is torch.uint8
    assert int(ours.max()) == 255
    assert sorted(map(bytes, ours.numpy())) == sorted(map(bytes, theirs))
    again = DigitsDataModule(seed=5).splits
    assert np.array_equal(again.train.label, splits.train.label)


def test_everything_the_command_line_links_is_known_before_setup_and_noise_is_on_train_only():
    clean, noisy = DigitsDataModule(), DigitsDataModule(noise=NoiseConfig("symmetric", 0.5, seed=3))
    assert noisy.num_classes == 10
    assert torch.equal(noisy.train_clean_label, clean.train_label)
    assert torch.equal(noisy.train_is_noise, noisy.train_label != clean.train_label)
    rate = noisy.train_is_noise.float().mean().item()
    assert abs(rate - 0.5) < 3 * (0.25 / 1297) ** 0.5
    assert np.array_equal(noisy.splits.test.label, clean.splits.test.label)
    summary = noisy.noise_summary
    assert summary["rate_realised"] == pytest.approx(rate, abs=1e-6)
    assert summary["hash"] != clean.noise_summary["hash"]
    assert (
        summary["hash"] == DigitsDataModule(noise=NoiseConfig("symmetric", 0.5, seed=3)).noise_summary["hash"]
    )


def test_a_test_size_out_of_range_is_refused():
    with pytest.raises(ValueError, match="test_size must be 10 to 1787"):
        DigitsDataModule(test_size=3)
