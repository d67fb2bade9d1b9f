"""What is known about a data set before an image is decoded: splits, labels and their noise."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_nrml.data.dataset import OnBadImage
from lightning_nrml.data.noise import NoiseConfig, NoisyLabels, apply_noise, label_hash
from lightning_nrml.data.noise_types import by_number
from lightning_nrml.data.sources import BadImageError, pixel_embedding
from lightning_nrml.data.splits import Split, Splits, check_splits, put_noise, warn_of_single_samples


class LabelledData(LightningDataModule):
    """The half of :class:`~lightning_nrml.data.NRMLDataModule` that needs no images.

    Args:
        noise: label noise for the train split, or the path of a label table.
        on_bad_image: ``"raise"`` or ``"skip"``.
    """

    def __init__(self, noise: NoiseConfig | Path | str | None, on_bad_image: OnBadImage) -> None:
        super().__init__()
        if isinstance(noise, str | Path):
            noise = NoiseConfig(table=str(noise))
        self.noise = noise or NoiseConfig()
        self.on_bad_image: OnBadImage = on_bad_image
        self._splits: Splits | None = None
        #: how many of the data set's own labels a label table changed; ``None`` = there is no table
        self.num_changed_labels: int | None = None
        #: train samples without a file, of which a label table need not know
        self._absent: list[int] = []
        #: split and name of the images that are not there
        self._missing: list[tuple[str, str]] = []
        #: what prediction is about: a split, or image files by name in its place
        self._predict_split = "test"
        self._other_images: dict[str, Path] | None = None

    def load_splits(self) -> Splits:
        """Labels and undecoded image sources of all splits."""
        raise NotImplementedError(f"{type(self).__name__} must implement load_splits() -> Splits")

    @property
    def splits(self) -> Splits:
        """All splits, checked, with train labels as given after noise; loaded on first use."""
        if self._splits is None:
            self._splits = self._prepare(self.load_splits())
        return self._splits

    def _prepare(self, splits: Splits) -> Splits:
        check_splits(splits, type(self).__name__)
        # On the full list and before anything else: a sample's label must not depend on missing files.
        if self.noise.kind != "none" or self.noise.table is not None:
            if self.noise.table is not None and self.on_bad_image == "skip":
                self._absent = splits.train.images.missing()
            noisy = self.noisy_labels(splits)
            if self.noise.table is not None:
                changed = noisy.label != splits.train.label
                self.num_changed_labels = int(np.delete(changed, self._absent, axis=0).sum())
            put_noise(splits, noisy)
        for name, split in splits.items():
            setattr(splits, name, self._without_missing(name, split))
        keep = splits.train.keep
        self._train_keep = torch.ones(len(splits.train), dtype=torch.bool)
        if keep is not None:
            self._train_keep.copy_(torch.as_tensor(np.array(keep)))
        if splits.train.label.ndim == 1:
            warn_of_single_samples(splits.train.label)
        return splits

    def noisy_labels(self, splits: Splits) -> NoisyLabels:
        """Train labels after ``self.noise``, whose mapping may name classes."""
        if self.noise.mapping:
            numbers: Any = by_number(self.noise.mapping, splits.class_names)
            self.noise = replace(self.noise, mapping=numbers)
        return self.inject_noise(splits.train, splits.num_classes)

    def inject_noise(self, train: Split, num_classes: int) -> NoisyLabels:
        """Labels of the train split after ``self.noise``; multi-label sets override this."""
        truth = train.label
        if train.clean_label is not None and self.noise.table is not None:
            truth = train.clean_label  # the table replaces labels that are noisy already
        elif train.clean_label is not None:
            raise ValueError(
                f"{type(self).__name__}: the train labels are noisy already (a noise list or human labels); "
                "leave noise unset, or load the clean labels"
            )
        embedding = None
        if self.noise.kind == "small_cluster":
            embedding = pixel_embedding(train.images)
        noisy = apply_noise(truth, self.noise, num_classes, embedding, train.paths, self._absent)
        # a data set with true labels knows the truth, whatever the table says
        return noisy if train.clean_label is None else replace(noisy, known=True)

    def _without_missing(self, name: str, split: Split) -> Split:
        missing = split.images.missing()
        if not missing:
            return split
        first = split.images.name(missing[0])
        if self.on_bad_image == "raise":
            raise BadImageError(
                f"{len(missing)} of {len(split)} {name} images are missing, the first is {first}; "
                "check the path, or set on_bad_image: skip to leave them out"
            )
        if len(missing) == len(split):
            raise BadImageError(
                f"all {len(split)} {name} images are missing, such as {first}; check the path"
            )
        warnings.warn(f"left out {len(missing)} missing {name} images, such as {first}", stacklevel=2)
        self._missing += [(name, split.images.name(row)) for row in missing]
        rows = np.setdiff1d(np.arange(len(split)), missing)
        return split.subset(rows)

    @property
    def num_classes(self) -> int:
        """Classes (label columns of a multi-label set) of the train split."""
        return self.splits.num_classes

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.splits.train.images.channels

    @property
    def num_train_samples(self) -> int:
        """N, the length of every per-sample ledger or bank."""
        return len(self.splits.train)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the train classes in label order."""
        return self.splits.class_names

    @property
    def train_label(self) -> Tensor:
        """``(N,)`` int64 labels as given, noise included."""
        return torch.as_tensor(self.splits.train.label)

    @property
    def train_clean_label(self) -> Tensor | None:
        """``(N,)`` int64 true labels where they are known (-1: none of the classes); for measurement only."""
        clean = self.splits.train.clean_label
        return None if clean is None else torch.as_tensor(clean)

    @property
    def train_is_noise(self) -> Tensor | None:
        """``(N,)`` bool (``(N, L)`` for multi-label), where the given label is known to be wrong."""
        train = self.splits.train
        return None if train.clean_label is None else torch.as_tensor(train.label != train.clean_label)

    @property
    def train_keep(self) -> Tensor:
        """``(N,)`` bool; write ``False`` into it to keep samples out of the following epochs.

        It starts with the ``keep`` column of the data set's table and of the label table, if there are any:
        a sample trains if neither leaves it out.
        """
        self.splits  # noqa: B018 - loads them
        return self._train_keep

    @property
    def train_paths(self) -> list[str] | None:
        """Names of the train images, for tables and galleries."""
        return self.splits.train.paths

    @property
    def predict_paths(self) -> list[str] | None:
        """Names of the images that :meth:`predict_dataloader` serves, by ``index``."""
        if self._other_images is not None:
            return list(self._other_images)
        split = self._split(self._predict_split)
        return None if split is None else split.paths

    @property
    def noise_summary(self) -> dict[str, Any]:
        """What the run card and the logs say about the train labels.

        ``rate_realised`` is the share of labels that differ from the clean ones (of the samples that a label
        table keeps), ``None`` if those are not known; ``hash`` identifies the label column.
        """
        wrong, keep = self.train_is_noise, self.splits.train.keep
        if wrong is not None and keep is not None:
            wrong = wrong[torch.as_tensor(keep)]
        return {
            "kind": self._noise_kind,
            "rate_requested": self.noise.rate,
            "rate_realised": None if wrong is None else round(float(wrong.float().mean()), 6),
            "hash": label_hash(self.splits.train.label),
            "num_classes": self.num_classes,
            "num_train": self.num_train_samples,
        }

    @property
    def _noise_kind(self) -> str:
        if self.noise.table is not None:
            return "table"
        if self.noise.kind == "none" and self.splits.train.clean_label is not None:
            return "given"
        return str(self.noise.kind)

    @property
    def validates_on_test(self) -> bool:
        """Whether the test split serves for validation, so that nothing may be tuned there."""
        return self.splits.val is None

    def _split(self, name: str) -> Split | None:
        found: Split | None = getattr(self.splits, name)
        return self.splits.test if name == "val" and self.validates_on_test else found

    def state_dict(self) -> dict[str, Any]:
        """Which labels a checkpoint was trained on."""
        return {"noise": self.noise_summary}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if training is resumed on other labels: per-sample records would not belong to them."""
        before, now = state_dict["noise"], self.noise_summary
        resuming = self.trainer is not None and self.trainer.training
        if resuming and before["hash"] != now["hash"]:
            warnings.warn(
                f"resuming on other train labels: the checkpoint had {before['num_train']} labels with hash "
                f"{before['hash']}, this data has {now['num_train']} with hash {now['hash']}",
                stacklevel=2,
            )
