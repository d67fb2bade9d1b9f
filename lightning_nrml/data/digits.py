"""Scikit-learn's embedded handwritten digits: real data without a download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.sources import MemorySource
from lightning_nrml.data.splits import Splits, split_by_rows
from lightning_nrml.data.views import MetricView, Views


class DigitsDataModule(NRMLDataModule):
    """1,797 digits of 1 x 8 x 8 pixels in ten classes (UCI "Optical Recognition of Handwritten Digits").

    Pixel values 0..16 are scaled to 0..255. The split is stratified and always the same; by default
    1,297 train and 500 test.

    Args:
        test_size: number of test images, 10 to 1,787.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(self, test_size: int = 500, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 10 <= test_size <= 1787:
            raise ValueError(f"test_size must be 10 to 1787 of the 1797 digits, got {test_size}")
        self.test_size = test_size

    def default_train_view(self) -> Views:
        """Small affine changes; a mirrored digit would be another sign."""
        return MetricView(8, crop_scale=None, flip=0.0, degrees=10, scale=(0.9, 1.1), translate=0.1)

    def load_splits(self) -> Splits:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
        label = digits.target.astype(np.int64)
        train, test = train_test_split(
            np.arange(len(label)), test_size=self.test_size, stratify=label, random_state=0
        )
        return split_by_rows(
            MemorySource(pixels),
            label,
            {"train": np.sort(train), "test": np.sort(test)},
            class_names=[str(c) for c in digits.target_names],
            where="scikit-learn's digits",
        )
