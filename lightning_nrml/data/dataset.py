"""The dataset that serves a labelled split in whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_nrml.data.bad_images import BadImageList
from lightning_nrml.data.sources import BadImageError, ImageSource
from lightning_nrml.data.splits import Split
from lightning_nrml.types import Batch

OnBadImage = Literal["raise", "skip"]


class IndexedDataset(Dataset[Batch]):
    """Serves a split in whole batches: ``ds.__getitems__([3, 1]) -> Batch`` (use :func:`identity`).

    A training row whose image turns out to be unreadable under ``on_bad_image="skip"`` is replaced
    by another row as a whole - image, labels and index - preferably of the same given label, so that
    a worker never dies, batches keep their size and class structure, and nothing is recorded under
    the wrong index. In an evaluated split the row is left out of its batch instead, for a substitute
    would count twice.

    Args:
        split: images and labels.
        on_bad_image: ``"raise"`` or ``"skip"``.
        replace: substitute unreadable rows (train) instead of leaving them out (evaluation).
        bad_list: where unreadable images are listed.
    """

    def __init__(
        self,
        split: Split,
        on_bad_image: OnBadImage = "raise",
        replace: bool = False,
        bad_list: BadImageList | None = None,
    ) -> None:
        self.images = split.images
        self.label = torch.as_tensor(split.label)
        self.clean_label = None if split.clean_label is None else torch.as_tensor(split.clean_label)
        self.on_bad_image, self.replace, self.bad_list = on_bad_image, replace, bad_list
        self._substitute: dict[int, int | None] = {}

    def __len__(self) -> int:
        return self.label.shape[0]

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([index])
        return Batch(**{key: value[0] for key, value in batch.items()})  # type: ignore[typeddict-item, index]

    def __getitems__(self, indices: list[int]) -> Batch:
        try:
            images, rows = self.images.get(indices), list(indices)
        except BadImageError:
            if self.on_bad_image == "raise":
                raise
            images, rows = self._get_readable(indices)
        index = torch.as_tensor(rows, dtype=torch.int64)
        batch = Batch(image=images, label=self.label[index], index=index)
        if self.clean_label is not None:
            batch["clean_label"] = self.clean_label[index]
            if self.label.ndim == 2:
                batch["is_noise"] = batch["label"] != batch["clean_label"]
        return batch

    def _get_readable(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        images, rows = [], []
        for index in indices:
            row: int | None = self._substitute.get(index, index)
            if row is None:
                continue
            try:
                image = self.images.get([row])
            except BadImageError as error:
                if self.bad_list is not None:
                    self.bad_list.add(self.images.name(index), str(error), index)
                found = self._find_substitute(index) if self.replace else None
                self._substitute[index] = None if found is None else found[0]
                if found is None:
                    continue
                row, image = found
            images.append(image)
            rows.append(row)
        # all unreadable: no rows, but of the right shape
        return (torch.cat(images) if images else self._find_substitute(indices[0])[1][:0]), rows

    def _find_substitute(self, index: int) -> tuple[int, Tensor]:
        """The next readable row, of the same given label if there is one."""
        following = torch.roll(torch.arange(len(self)), -index)[1:]
        same = (self.label[following] == self.label[index]).reshape(len(following), -1).all(1)
        for row in torch.cat([following[same], following[~same]]).tolist():
            try:
                return row, self.images.get([row])
            except BadImageError:
                continue
        raise BadImageError(f"none of the {len(self)} images can be read, such as {self.images.name(index)}")


class UnlabelledDataset(IndexedDataset):
    """Images alone: its batches have ``image`` and ``index``.

    Args:
        images: the images.
        on_bad_image, bad_list: see :class:`IndexedDataset`.
    """

    def __init__(
        self, images: ImageSource, on_bad_image: OnBadImage = "raise", bad_list: BadImageList | None = None
    ) -> None:
        label = np.zeros(len(images), dtype=np.int64)  # nobody sees it
        super().__init__(Split(images, label), on_bad_image, bad_list=bad_list)

    def __getitems__(self, indices: list[int]) -> Batch:
        batch: Any = super().__getitems__(indices)
        del batch["label"]
        return cast(Batch, batch)


def identity(batch: Any) -> Any:
    """Collate function of datasets that already return batches."""
    return batch
