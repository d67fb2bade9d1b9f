"""A map of the embeddings: what lies beside what, during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_nrml.callbacks.balanced_sample import BalancedSample, Sample
from lightning_nrml.callbacks.embedding import (
    embed,
    embedding_of,
    is_due,
    labels_of,
    train_set_loader,
)
from lightning_nrml.callbacks.evaluator import SplitCallback
from lightning_nrml.callbacks.map_file import draw_map, map_frame
from lightning_nrml.callbacks.plane import METHODS, Method, check_installed, project
from lightning_nrml.files import write_frame
from lightning_nrml.memory import SampleLedger
from lightning_nrml.metrics.search import prepare_rows
from lightning_nrml.modules.full_pass import evaluating

_TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}


class EmbeddingMap(SplitCallback):
    """Draws the embeddings as points of the plane: ``embedding_map.png`` and ``embedding_map.csv``.

    A class-balanced sample of the split is embedded, scaled to length 1 (as retrieval compares cosines) and
    projected. The picture is coloured by class, with crosses where the label is known to be wrong; the table
    has ``index``, ``path``, ``label``, ``label_name``, ``clean_label``, ``x`` and ``y``, and for the train
    split ``keep``, the filter's decision, as far as they are known. Both are replaced at every drawing, and
    logged to W&B as ``embedding_map/<split>`` and ``embedding_map/<split>_points`` if that is a logger of the
    run. Files of the train and test splits are called ``embedding_map_train`` and ``embedding_map_test``.

    The sample depends on ``seed`` and on the data only: not on the epoch, the batches or the number of ranks.
    Rows with NaN or infinity are left out, and said. Training is the same to the bit with and without.

    Args:
        every_n_epochs: epochs between two drawings; the last epoch always counts.
        split: ``"val"`` (in ``nrml test`` the test split), or ``"train"``: after an epoch of training a pass
            over the train split without augmentation; needs no validation split.
        max_samples: points over all ranks, 3 or more.
        min_per_class: points of a class before another class is begun: of 10,000 classes, 2,000 points show
            some 400 classes with 5 points each, not 2,000 classes with one.
        method: ``"pca"``; ``"tsne"``, which is slower and shows groups better, but neither their sizes
            nor their distances; or ``"umap"``, which needs the package umap-learn.
        seed: of the sample, and of t-SNE and UMAP.
        folder: where to write; default the trainer's ``default_root_dir``.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        split: Literal["val", "train"] = "val",
        max_samples: int = 2000,
        min_per_class: int = 5,
        method: Method = "pca",
        seed: int = 0,
        folder: str | None = None,
    ) -> None:
        super().__init__(every_n_epochs)
        if split not in ("val", "train"):
            raise ValueError(f"split is '{split}': choose 'val' or 'train'.")
        if max_samples < 3:
            raise ValueError(f"max_samples is {max_samples}: it must be 3 or more.")
        if min_per_class < 1:
            raise ValueError(f"min_per_class is {min_per_class}: it must be 1 or more.")
        if method not in METHODS:
            raise ValueError(f"method is '{method}': choose one of {', '.join(METHODS)}.")
        self.split, self.method, self.folder = split, method, folder
        self.max_samples, self.min_per_class, self.seed = max_samples, min_per_class, seed
        self._sample: BalancedSample | None = None
        self._drawn: set[Path] = set()

    # ---- when -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before the training what could not be drawn after it."""
        check_installed(self.method)
        data = getattr(trainer, "datamodule", None)
        label = getattr(data, "train_label", None)
        if isinstance(label, Tensor) and label.ndim != 1:
            raise ValueError(
                f"EmbeddingMap colours by one label per image, but {type(data).__name__} has several: "
                "leave it out for multi-label data."
            )
        if self.split == "train" and not hasattr(data, "embed_dataloader"):
            raise TypeError(
                "EmbeddingMap(split='train') needs a datamodule with `embed_dataloader()` (all datamodules "
                "of lightning_nrml have one); use split='val' with this one."
            )

    def begin(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Start collecting, if this epoch counts."""
        wanted = self.split == "val" and self._is_due(trainer)
        self._sample = self._new_sample() if wanted else None

    def update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Collect one batch."""
        if self._sample is not None:
            self._add(self._sample, embedding_of(trainer, pl_module, outputs, batch), batch)

    def finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Draw the evaluated split, or in ``validate`` the train split."""
        sample, self._sample = self._sample, None
        if sample is not None:
            self._draw(trainer, pl_module, sample, prefix)
        elif self.split == "train" and trainer.state.fn == "validate":
            self._draw_train_split(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the train split, if this epoch counts."""
        if self.split == "train" and self._is_due(trainer):
            self._draw_train_split(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing was drawn."""
        if not self._drawn and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"EmbeddingMap has drawn nothing: no validation came in an epoch that counts (every "
                f"{self.every_n_epochs}, and the last). Lower every_n_epochs, or use split='train' if the "
                "data have no validation split."
            )

    def _is_due(self, trainer: Trainer) -> bool:
        return is_due(trainer, self.every_n_epochs) and not getattr(trainer, "fast_dev_run", False)

    # ---- what -------------------------------------------------------------------------------------

    def _new_sample(self) -> BalancedSample:
        return BalancedSample(self.max_samples, self.min_per_class, self.seed)

    @staticmethod
    def _add(sample: BalancedSample, embedding: Tensor, batch: Any) -> None:
        label = labels_of(batch, "given", "EmbeddingMap")
        if "index" not in batch:
            raise ValueError(
                f"EmbeddingMap needs 'index', the position in the data set, in every batch. The keys are "
                f"{sorted(batch)}."
            )
        sample.add(embedding, batch["index"], label, batch.get("clean_label"))

    def _draw_train_split(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sample, views = self._new_sample(), getattr(trainer.datamodule, "apply_views", None)  # type: ignore[attr-defined]
        with evaluating(pl_module):
            for batch in train_set_loader(trainer, "EmbeddingMap(split='train')"):
                if views is None:
                    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                else:  # not through the trainer's hooks, which would augment while it trains
                    batch = views({k: v.to(pl_module.device) for k, v in batch.items()}, training=False)
                self._add(sample, embed(trainer, pl_module, batch["image"]), batch)
        self._draw(trainer, pl_module, sample, "train")

    def _draw(
        self, trainer: Trainer, pl_module: LightningModule, collected: BalancedSample, split: str
    ) -> None:
        """Gather over the ranks; project, write and log on rank 0."""
        sample = collected.gathered(pl_module.device)
        if not trainer.is_global_zero:
            return
        if sample.not_finite:
            rank_zero_warn(
                f"EmbeddingMap left out {sample.not_finite} of {sample.seen} {split} images: their "
                "embeddings hold NaN or infinity."
            )
        if len(sample.index) < 3:
            rank_zero_warn(
                f"EmbeddingMap drew nothing: the {split} split gave {len(sample.index)} usable embeddings, "
                "and a map needs 3."
            )
            return
        xy, axes = project(prepare_rows(sample.embedding).cpu().numpy(), self.method, self.seed)
        name = "embedding_map" if split == "val" else f"embedding_map_{split}"
        picture = Path(self.folder or trainer.default_root_dir, f"{name}.png")
        frame = map_frame(sample, xy, *_names(trainer, split), _keep(trainer, pl_module, split))
        write_frame(picture.with_suffix(".csv"), frame)
        draw_map(frame, picture, self._title(trainer, sample, split), axes)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # where Lightning puts the metrics of this evaluation; global_step is one further
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_image(f"embedding_map/{split}", [str(picture)], step)
                logger.log_table(f"embedding_map/{split}_points", dataframe=frame, step=step)
        if picture not in self._drawn:
            rank_zero_info(f"Embedding map of {len(frame)} {split} images: {picture} (points: {name}.csv)")
        self._drawn.add(picture)

    def _title(self, trainer: Trainer, sample: Sample, split: str) -> str:
        when = f", epoch {trainer.current_epoch}" if trainer.state.fn == "fit" else ""
        left_out = f", {sample.not_finite} left out (NaN)" if sample.not_finite else ""
        classes = len(sample.label.unique())
        count = f"{len(sample.index)} of {sample.seen} images, {classes} classes{left_out}"
        return f"{split}{when}: {_TITLES[self.method]} of {count}"


def _names(trainer: Trainer, split: str) -> tuple[list[str] | None, list[str] | None]:
    """Names of the classes and paths of the images of a split, where the datamodule knows them."""
    data = getattr(trainer, "datamodule", None)
    names, splits = getattr(data, "class_names", None), getattr(data, "splits", None)
    if split == "train":
        return names, getattr(data, "train_paths", None)
    part = getattr(splits, split, None)
    if part is None:  # the test split serves for validation
        part = getattr(splits, "test", None)
    # the names are those of the training classes
    return (None if getattr(splits, "zero_shot", False) else names), getattr(part, "paths", None)


def _keep(trainer: Trainer, pl_module: LightningModule, split: str) -> np.ndarray | None:
    """``(N,)`` bool: what the filter kept so far; without one, what a label table keeps; else ``None``."""
    if split != "train":
        return None
    ledger = getattr(pl_module, "noise_ledger", None)
    if isinstance(ledger, SampleLedger):
        return ledger.kept().cpu().numpy()
    keep = getattr(getattr(trainer, "datamodule", None), "train_keep", None)
    if not isinstance(keep, torch.Tensor) or bool(keep.all()):
        return None
    return keep.cpu().numpy()
