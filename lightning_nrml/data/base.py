"""The datamodule that every data set of this package shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_nrml import distributed
from lightning_nrml.data.bad_images import BadImageList
from lightning_nrml.data.dataset import IndexedDataset, UnlabelledDataset, identity
from lightning_nrml.data.image_files import found_images
from lightning_nrml.data.labelled import LabelledData
from lightning_nrml.data.loader import ResumableLoader, resume_after_whole_epochs, start_worker
from lightning_nrml.data.noise import NoiseConfig
from lightning_nrml.data.samplers import (
    MPerClassSampler,
    NeighbourSampler,
    ShuffleSampler,
    UnpaddedSampler,
)
from lightning_nrml.data.sources import cached, decoded_bytes, stored_size
from lightning_nrml.data.splits import SPLIT_NAMES, Split
from lightning_nrml.data.views import EvalView, MetricView, ViewKey, Views
from lightning_nrml.types import Batch

# "auto" keeps decoded images in memory up to this size per split
CACHE_LIMIT_BYTES = 512 * 2**20
BAD_IMAGE_LIST = "bad_images.tsv"
_SPLITS_OF_STAGE = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": (),  # the loader fills the cache of what was chosen
    None: ("train", "val", "test"),
}


class NRMLDataModule(LabelledData):
    """Base of all datamodules: noise on train labels, rank-aware samplers, views on the device.

    A subclass writes :meth:`load_splits` and, if it likes, :attr:`default_size` and the default views.
    Labels are loaded on first use, so ``num_classes``, ``in_channels`` and ``num_train_samples`` can
    be read before ``setup``. Without a validation split the test split serves for validation, as is
    usual in metric learning: do not choose checkpoints by it.

    Args:
        batch_size: samples per process and step.
        m_per_class: samples of each class in a batch (of the labels as given); ``None`` = plain
            shuffling.
        eval_batch_size: rows per process in evaluation.
        noise: label noise for the train split, or the path of a label table.
        seed: seed of the sampler and of the views. Noise has its own seed.
        num_workers: loader processes.
        pin_memory: page-locked batches, for a GPU.
        train_view: what training images go through, on the device; ``None`` = a default of the set.
        eval_view: the same for validation, test, prediction and :meth:`embed_dataloader`.
        epoch_length: samples per epoch over all processes, with ``m_per_class``; ``None`` = the size of
            the train split.
        on_bad_image: ``"raise"`` stops with the path of a missing or corrupt image. ``"skip"``
            leaves missing files out from the start, replaces corrupt train images by another sample
            when they are met, leaves corrupt evaluation images out, and lists all of them in
            ``bad_images.tsv`` under the trainer's ``default_root_dir``.
        cache: keep decoded uint8 images in memory; ``"auto"`` does so up to 512 MiB per split.

    Attributes:
        train_sampler: the sampler of the last :meth:`train_dataloader`, for mid-epoch resume.
        train_neighbours: ``(N, K)`` int64 nearest train images of each, -1 = none. Set by a method that
            trains on anchors with their neighbours (InsCLR), which changes it in place between epochs.
    """

    train_sampler: MPerClassSampler | NeighbourSampler | ShuffleSampler | None = None
    train_neighbours: Tensor | None = None

    def __init__(
        self,
        batch_size: int = 64,
        m_per_class: int | None = None,
        eval_batch_size: int = 256,
        noise: NoiseConfig | Path | str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        train_view: Views | None = None,
        eval_view: Views | None = None,
        epoch_length: int | None = None,
        on_bad_image: Literal["raise", "skip"] = "raise",
        cache: Literal["auto"] | bool = "auto",
    ) -> None:
        super().__init__(noise, on_bad_image)
        for name, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 (load in this process) or more, got {num_workers}")
        if m_per_class is not None and m_per_class < 1:
            raise ValueError(f"m_per_class must be at least 1, or null for shuffling; got {m_per_class}")
        if m_per_class is not None and batch_size % m_per_class:
            near = max(batch_size // m_per_class, 1) * m_per_class
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of m_per_class {m_per_class}: set batch_size "
                f"to {near}, or another m_per_class"
            )
        if epoch_length is not None and m_per_class is None:
            raise ValueError("epoch_length needs m_per_class; or else use trainer.limit_train_batches")
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image must be 'raise' or 'skip', got {on_bad_image!r}")
        if cache not in ("auto", True, False):
            raise ValueError(f"cache must be 'auto', true or false, got {cache!r}")
        self.batch_size, self.m_per_class, self.eval_batch_size = batch_size, m_per_class, eval_batch_size
        self.seed, self.epoch_length = seed, epoch_length
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.cache = cache
        self._views = {"train": train_view, "eval": eval_view}

    # ---- what a subclass gives -------------------------------------------------------------------

    def default_train_view(self) -> Views:
        """The training view if none was given."""
        return MetricView(self.view_size)

    def default_eval_view(self) -> Views:
        """The evaluation view if none was given."""
        return EvalView(self.view_size)

    @property
    def view_size(self) -> int:
        """Side of the images that the default views put out: the short side of what is stored."""
        return min(stored_size(self.splits.train.images))

    # ---- life cycle ------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Load the labels, and decode what is kept in memory; safe to call again.

        Raises:
            ValueError: the trainer has ``overfit_batches``.
        """
        if stage == "fit" and self.trainer is not None and getattr(self.trainer, "overfit_batches", False):
            raise ValueError(
                "trainer.overfit_batches would put samplers that know of neither classes nor ranks "
                "in the place of the datamodule's: use trainer.limit_train_batches instead."
            )
        for name in _SPLITS_OF_STAGE.get(stage, _SPLITS_OF_STAGE[None]):
            split = self._split(name)
            if split is not None:
                self._fill_cache(split)
        self._begin_bad_list(stage)
        if stage == "fit" and self.trainer is not None:
            resume_after_whole_epochs(self.trainer)

    def _fill_cache(self, split: Split) -> None:
        if self.cache is True or (self.cache == "auto" and decoded_bytes(split.images) <= CACHE_LIMIT_BYTES):
            split.images = cached(split.images, self.on_bad_image)

    def _bad_list(self, split: str) -> BadImageList | None:
        if self.on_bad_image == "raise":
            return None
        folder = Path(self.trainer.default_root_dir if self.trainer is not None else ".")
        return BadImageList(folder / BAD_IMAGE_LIST, split)

    @rank_zero_only
    def _begin_bad_list(self, stage: str | None) -> None:
        """Drop the list of an earlier run, and list what is missing; loaders do not run yet on any rank."""
        bad_list = self._bad_list("train")
        if bad_list is None:
            return
        if stage == "fit" and self.trainer is not None:
            bad_list.file.unlink(missing_ok=True)
        for split, name in self._missing:
            replace(bad_list, split=split).add(name, "missing")

    # ---- loaders ---------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled or m-per-class batches of the train split, or anchors with their ``train_neighbours``.

        ``train_keep`` is obeyed every epoch.
        """
        self._fill_cache(self.splits.train)
        if self.train_neighbours is not None:
            self.train_sampler = NeighbourSampler(
                self.train_neighbours, self.batch_size, seed=self.seed, keep=self.train_keep
            )
        elif self.m_per_class is None:
            self.train_sampler = ShuffleSampler(
                self.num_train_samples, self.batch_size, seed=self.seed, keep=self.train_keep
            )
        else:
            length = None
            if self.epoch_length is not None:
                length = max(1, self.epoch_length // (self.batch_size * distributed.world_size()))
            self.train_sampler = MPerClassSampler(
                self.train_label,
                self.m_per_class,
                self.batch_size,
                seed=self.seed,
                keep=self.train_keep,
                length=length,
            )
        dataset = IndexedDataset(
            self.splits.train, self.on_bad_image, replace=True, bad_list=self._bad_list("train")
        )
        return self._loader(
            dataset,
            self.train_sampler,
            self.batch_size,
            drop_last=True,
            loader_class=partial(ResumableLoader, position=self._position),
        )

    def _position(self) -> tuple[int | None, int]:
        """Current epoch, and how many of its batches were trained on: not 0 only in a run resumed there."""
        if self.trainer is None:
            return None, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation split in order (the test split if there is none), nothing padded."""
        return [] if self._split("val") is None else self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split in order, nothing padded."""
        return self._eval_loader("test")

    def predict_from(self, split: str = "test", images: str | Path | None = None) -> None:
        """Choose what :meth:`predict_dataloader` serves; until then it is the test split.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            images: a folder of images (all below it, in sorted order), or a single image, in the place of a
                split. They are read as the images of the train split are, and their batches have no labels.

        Raises:
            FileNotFoundError: there is nothing at ``images``.
            ValueError: an unknown split, no images in the folder, or a data set whose images are no files.
        """
        if split not in SPLIT_NAMES:
            raise ValueError(f"split must be {', '.join(SPLIT_NAMES)}, got {split!r}")
        self._predict_split = split
        self._other_images = None if images is None else found_images(Path(images).expanduser())

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The split or the images of :meth:`predict_from` in order, nothing padded."""
        if self._other_images is None:
            return self._eval_loader(self._predict_split)
        source = self.splits.train.images.other([str(path) for path in self._other_images.values()])
        dataset = UnlabelledDataset(source, self.on_bad_image, self._bad_list("images"))
        return self._loader(dataset, UnpaddedSampler(len(dataset)), self.eval_batch_size)

    def embed_dataloader(self) -> DataLoader[Batch]:
        """The whole train split in order, un-padded over ranks, with the evaluation view."""
        return self._eval_loader("train")

    def _eval_loader(self, name: str) -> DataLoader[Batch]:
        split = self._split(name)
        if split is None:
            raise ValueError(
                f"{type(self).__name__} has no {name} split here: there is nothing to evaluate on"
            )
        self._fill_cache(split)
        dataset = IndexedDataset(
            split, self.on_bad_image, bad_list=self._bad_list("test" if split is self.splits.test else name)
        )
        return self._loader(dataset, UnpaddedSampler(len(dataset)), self.eval_batch_size)

    def _loader(
        self,
        dataset: IndexedDataset,
        sampler: DistributedSampler[int],
        batch_size: int,
        drop_last: bool = False,
        loader_class: Callable[..., DataLoader[Batch]] = DataLoader,
    ) -> DataLoader[Batch]:
        rank = getattr(self.trainer, "global_rank", 0)
        return loader_class(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=identity,
            pin_memory=self.pin_memory,
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=partial(start_worker, rank=rank),
        )

    # ---- views -----------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Run the views where the batch now is; batches without ``image`` pass through."""
        if not isinstance(batch, dict) or "image" not in batch:
            return batch
        return self.apply_views(batch, training=self.trainer is not None and bool(self.trainer.training))

    def apply_views(self, batch: dict[str, Any], training: bool) -> dict[str, Any]:
        """Replace ``image`` by the view; several views go to ``views`` and the first to ``image``.

        The random numbers of the training view are named by seed, epoch, batch and row, so that they
        are the same on any number of ranks and after a resume.
        """
        image = batch["image"]
        view = self._view("train" if training else "eval", image.device)
        key = self._view_key() if training and self.trainer is not None else ViewKey(self.seed)
        # an evaluation batch whose images were all unreadable has no rows, which views refuse
        probe = image if len(image) else image.new_zeros((1, *image.shape[1:]))
        views = [v[: len(image)] for v in view(probe, key)]
        out = {**batch, "image": views[0]}
        if len(views) > 1:
            out["views"] = views
        return out

    @property
    def eval_view(self) -> Views:
        """What images go through in evaluation."""
        return self._view("eval", torch.device("cpu"))

    def _view(self, which: str, device: torch.device) -> Views:
        view = self._views[which]
        if view is None:
            view = self.default_train_view() if which == "train" else self.default_eval_view()
        self._views[which] = view.to(device)
        return view

    def _view_key(self) -> ViewKey:
        trainer = self.trainer
        epoch, batch = self._position()
        assert trainer is not None
        assert epoch is not None
        return ViewKey(self.seed, epoch, batch, trainer.global_rank * self.batch_size)
