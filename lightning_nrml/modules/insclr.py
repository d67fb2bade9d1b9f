"""InsCLR: positives for instance retrieval, mined in the batch and in a memory of the whole set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.losses import InsCLRLoss
from lightning_nrml.memory import CandidatePool, FeatureBank, MiningConfig
from lightning_nrml.memory.mining import group_labels, keep_neighbours, mine, random_negatives
from lightning_nrml.metrics.search import Backend, topk_search
from lightning_nrml.models import create_head, load_weights
from lightning_nrml.models.heads import HeadName
from lightning_nrml.modules.arguments import as_config
from lightning_nrml.modules.base import EmbeddingModule, mix_seed
from lightning_nrml.modules.full_pass import embed_train_split, evaluating
from lightning_nrml.types import Batch, FilterContext, Selection, StepOutput

#: parts that exist in training only; their size is that of the training set
MEMORIES = ("pool", "bank", "plain_bank")


class InsCLR(EmbeddingModule):
    """InsCLR, "Improving Instance Retrieval with Self-Supervision": fine-tunes a trained net without labels.

    A batch is A anchors, each followed by its K nearest training images; image and neighbours share a
    label. Stage ``base`` trusts them all and adds random memory rows as negatives; stage ``impr`` rejects
    neighbours that are not similar now and mines further positives in a memory of the whole training set
    (:mod:`lightning_nrml.memory.mining`). It needs :class:`.InsCLRViews`: mining sees un-augmented images.

    The candidate pool (nearest neighbours of each image) comes from one un-augmented pass with the present
    net before the first batch, and again before every ``pool_every_n_epochs``-th epoch; ``impr`` fills its
    memory from the same pass. Pool and memory are saved in checkpoints; ``init_weights`` leaves them out.
    They take N x (8 ``pool_size`` + 4 D) bytes (``impr``: 8 D) on the device of the net.

    Images of the batch are never read from the memory; there the published code pushed an anchor away from
    its own stored feature, or pulled it to an image that the batch loss pushed away.

    Source: Deng et al., AAAI 2022, arXiv 2112.01390; details as in the authors' code.

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        stage: ``base`` or ``impr``.
        head: ``none`` (the features of the backbone), ``linear`` or ``mlp``.
        embedding_dim: size of the embedding; default that of the features.
        margin: cosine from which on a negative is pushed.
        neighbours: K, nearest images that follow each anchor; ``batch_size`` is a multiple of K + 1.
        pool_size: neighbours kept per image.
        pool_every_n_epochs: rebuild the pool before every so many epochs; 0 = never, as published.
        search: ``torch``, or ``faiss`` (exact too, on the CPU).
        memory_size: rows read from the memory per step; 0 switches it off.
        memory_negatives: read negatives, too (``impr``; INSTRE's setting is without).
        memory_weight: weight of the memory loss.
        memory_write_start: optimiser steps before features are written (``base``).
        memory_start: optimiser steps before the memory is read.
        exclude_nearest: pool neighbours of a batch image that are never its negatives (``base``).
        mining: thresholds of stage ``impr``.
    """

    pool: CandidatePool | None
    bank: FeatureBank | None
    plain_bank: FeatureBank | None

    def __init__(
        self,
        backbone: str = "resnet50",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        stage: Literal["base", "impr"] = "base",
        head: HeadName = "none",
        embedding_dim: int | None = None,
        margin: float = 0.4,
        neighbours: int = 3,
        pool_size: int = 500,
        pool_every_n_epochs: int = 0,
        search: Backend = "torch",
        memory_size: int = 100_000,
        memory_negatives: bool = True,
        memory_weight: float = 1.0,
        memory_write_start: int = 0,
        memory_start: int = 0,
        exclude_nearest: int = 50,
        mining: MiningConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, **kwargs)
        if stage not in ("base", "impr"):
            raise ValueError(f"stage must be 'base' or 'impr', got '{stage}'.")
        least = {"neighbours": 1, "pool_size": neighbours, "pool_every_n_epochs": 0, "memory_size": 0}
        for name, low in {**least, "exclude_nearest": 0}.items():
            if locals()[name] < low:
                raise ValueError(f"{name} is {locals()[name]}: it must be {low} or more.")
        self._embedding_dim = embedding_dim or self.num_features
        self.head = create_head(head, self.num_features, self._embedding_dim)
        self.loss = InsCLRLoss(margin)
        self.stage, self.neighbours = stage, neighbours
        self.pool_size, self.pool_every_n_epochs, self.search = pool_size, pool_every_n_epochs, search
        self.memory_size, self.memory_negatives = memory_size, memory_negatives
        self.memory_weight, self.memory_start = memory_weight, memory_start
        self.memory_write_start, self.exclude_nearest = memory_write_start, exclude_nearest
        self.mining = as_config(MiningConfig, mining)
        for name in MEMORIES:
            self.register_module(name, None)
        self.register_load_state_dict_pre_hook(_drop_absent_memories)
        self._draw_seed = 0
        self._plain: Tensor | None = None

    @property
    def embedding_dim(self) -> int:
        """Columns of the embedding."""
        return self._embedding_dim

    @property
    def has_memory(self) -> bool:
        """True if features of earlier batches are read."""
        return self.memory_size > 0

    def embed(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, embedding_dim)`` unit rows."""
        return F.normalize(self._project(x), dim=1)

    def _project(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out.float()

    # ---- life cycle -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """As the base; before training also makes pool and memory and asks the data for neighbours."""
        if stage == "fit":
            data = self._data()
            self.make_memories(data.num_train_samples)
            shape = (data.num_train_samples, self.neighbours)
            data.train_neighbours = torch.full(shape, -1, dtype=torch.int64)
        super().setup(stage)

    def teardown(self, stage: str) -> None:
        """Give the data its own batches back."""
        if stage == "fit":
            self._data().train_neighbours = None

    def make_memories(self, num_samples: int) -> None:
        """Empty pool and memory for a training set of this size (``setup`` calls it)."""
        self.pool = CandidatePool(num_samples, self.pool_size).to(self.device)
        if self.has_memory:
            self.bank = FeatureBank(num_samples, self.embedding_dim).to(self.device)
            if self.stage == "impr":
                self.plain_bank = FeatureBank(num_samples, self.embedding_dim).to(self.device)

    def on_fit_start(self) -> None:
        """Apply start weights, of the net alone: a memory of another run would not belong to it."""
        if self.init_weights and self.trainer.ckpt_path is None:
            net = nn.ModuleDict({"backbone": self.backbone, "head": self.head})
            load_weights(net, self.init_weights)

    def on_train_start(self) -> None:
        """Build the pool, unless it was restored."""
        super().on_train_start()
        if self.trainer.ckpt_path is None:
            self.build_pool()
        # a run that resumes at the end of an epoch gets no on_train_epoch_start for the next one
        self._rebuild_if_due()
        self._tell_data()

    def on_train_epoch_start(self) -> None:
        """Rebuild the pool if it is time."""
        if self._rebuild_if_due():
            self._tell_data()

    def _rebuild_if_due(self) -> bool:
        epoch, every = self.current_epoch, self.pool_every_n_epochs
        due = bool(every) and int(self._pool().epoch) < epoch - epoch % every
        if due:
            self.build_pool()
        return due

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """As the base; also names the random rows of the memory, equal on all ranks and after a resume."""
        super().on_train_batch_start(batch, batch_idx)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._draw_seed = mix_seed(seed, self.current_epoch, batch_idx)

    @torch.no_grad()
    def build_pool(self) -> None:
        """Fill the pool (and the memory of stage ``impr``) from one un-augmented pass."""
        features = embed_train_split(self)
        index = torch.isfinite(features).all(dim=1).nonzero().flatten()
        rows = features[index]
        if len(index) < len(features):
            rank_zero_warn(
                f"InsCLR: {len(features) - len(index)} of {len(features)} training images have no finite "
                "feature; they are nobody's neighbours."
            )
        if len(index) > 1:
            number = torch.arange(len(rows), device=rows.device)
            size = min(self.pool_size, len(rows) - 1)
            value, found = topk_search(rows, rows, size, exclude=number, backend=self.search)
            near = torch.where(found >= 0, index[found.clamp_min(0)], -1)
        else:
            value, near = rows.new_empty(len(rows), 0), index.new_empty(len(rows), 0)
        self._pool().fill(index, near, value, self.current_epoch)
        if self.stage == "impr":
            for bank in (self.bank, self.plain_bank):
                if bank is not None:
                    bank.write(index, rows, self.current_epoch)

    def _tell_data(self) -> None:
        self._data().train_neighbours.copy_(self._pool().neighbour[:, : self.neighbours])

    def _data(self) -> Any:
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "train_neighbours") or getattr(data, "m_per_class", None) is not None:
            raise TypeError(
                "InsCLR needs a datamodule that follows `train_neighbours`, with m_per_class left at null "
                f"(all datamodules of lightning_nrml do); got {type(data).__name__}."
            )
        return data

    def _pool(self) -> CandidatePool:
        if self.pool is None:
            raise RuntimeError("InsCLR has no candidate pool yet: fit it, or call make_memories(N) first.")
        return self.pool

    # ---- the step -------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Label the batch by its groups, mine the memory, and leave the loss to be evaluated."""
        index, m = batch["index"], self.neighbours + 1
        if len(index) % m:
            raise ValueError(f"InsCLR needs groups of {m} rows, but the batch has {len(index)}.")
        z = self._project(batch["image"])
        self._plain = self._plain_features(batch) if self.stage == "impr" else None
        every = distributed.gather(index)
        kept = self._kept(every.view(-1, m), self._plain)
        label = group_labels(kept).flatten()
        own = label[distributed.own_rows([len(index)] * distributed.world_size())]
        reading = self.has_memory and self.global_step >= self.memory_start
        rows, claim = (
            self._read(every.view(-1, m), label.view(-1, m), self._plain) if reading else (None, None)
        )

        def loss_fn(weight: Tensor | None) -> Mapping[str, Tensor]:
            partner_weight = None if weight is None else distributed.gather(weight)
            loss = self.loss(z, own, distributed.gather(z, grad=True), label, weight, partner_weight)
            parts = {"loss": loss, "batch_loss": loss, "kept_neighbours": kept.float().mean()}
            if rows is None or claim is None:
                return parts
            known = (own > 0).float() if weight is None else (own > 0) * weight
            features = cast(FeatureBank, self.bank).embedding[rows]
            memory_loss = self.loss(z, own, features, claim, known)
            parts |= {"loss": loss + self.memory_weight * memory_loss, "memory_loss": memory_loss}
            return parts | {"memory_positives": (claim <= len(kept)).sum() / len(kept)}

        extras = {"group_label": own, "memory_index": rows, "memory_label": claim}
        return StepOutput(z, batch["label"], index, loss_fn=loss_fn, extras=extras)

    def _plain_features(self, batch: Batch) -> Tensor:
        """``(W B, D)`` unit features of the un-augmented images of all ranks; batch norm does not move."""
        views = batch.get("views", [])
        if len(views) != 2:
            raise ValueError(
                "InsCLR's stage 'impr' needs an augmented and an un-augmented view of each image, but the "
                f"batch holds {max(len(views), 1)}: set data.init_args.train_view to InsCLRViews."
            )
        with evaluating(self.backbone, self.head):
            return distributed.gather(self.embed(views[1].to(batch["image"].dtype)))

    def _kept(self, index: Tensor, plain: Tensor | None) -> Tensor:
        """``(G, K)`` bool: neighbours that carry their anchor's label.

        An image that stands in for an unreadable neighbour is no neighbour.
        """
        anchor, others = index[:, :1], index[:, 1:]
        near = self._pool().neighbour[anchor[:, 0], : self.neighbours]
        genuine = (others[:, :, None] == near[:, None, :]).any(dim=2) | (others == anchor)
        if plain is None:
            return genuine
        return genuine & keep_neighbours(plain.view(*index.shape, -1), self.mining)

    @torch.no_grad()
    def _read(self, index: Tensor, label: Tensor, plain: Tensor | None) -> tuple[Tensor, Tensor]:
        """Dataset positions and labels of the memory rows that this step meets, equal on all ranks."""
        bank, generator = cast(FeatureBank, self.bank), torch.Generator().manual_seed(self._draw_seed)
        near, similarity = self._pool().of(index)
        if plain is None:
            near = near[:, :, : self.exclude_nearest].flatten(0, 1)
            rows = random_negatives(index.flatten(), near, bank.filled, self.memory_size, generator)
            return rows, torch.full_like(rows, len(index) + 1)
        mined = cast(FeatureBank, self.plain_bank)
        return mine(
            index,
            label > 0,
            plain.view(*index.shape, -1),
            near,
            similarity,
            mined.embedding,
            mined.filled & bank.filled,
            self.mining,
            self.memory_size,
            self.memory_negatives,
            generator,
        )

    def remember(self, ctx: FilterContext, selection: Selection) -> None:
        """Write the kept rows of the gathered batch; of an image that occurs twice the last row stays."""
        plain, self._plain = self._plain, None
        if self.bank is None or (self.stage == "base" and self.global_step < self.memory_write_start):
            return
        keep = selection.keep
        self.bank.write(ctx.index, ctx.embedding, ctx.epoch, keep)
        if plain is not None and self.plain_bank is not None:
            self.plain_bank.write(ctx.index, plain, ctx.epoch, keep)


def _drop_absent_memories(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a module that does not train load a checkpoint that holds pool and memory."""
    for name in MEMORIES:
        if getattr(module, name) is None:
            for key in [k for k in state if k.startswith(f"{prefix}{name}.")]:
                del state[key]
