"""The LightningModule that every method of this package extends."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.filters.chain import ATTACHED, FilterChain, gathered_context, tolerate_absent_filters
from lightning_nrml.models import create_backbone, load_weights
from lightning_nrml.models.backbone import Stem
from lightning_nrml.modules.arguments import as_config, plain_arguments
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig, create_optimizer, create_schedule
from lightning_nrml.types import Batch, FilterContext, Selection, StepOutput


class EmbeddingModule(LightningModule):
    """Template of all methods: subclasses write ``step`` and, if it is not head(backbone), ``embed``.

    The base owns the training step (step -> filters -> weighted loss -> log), the optimiser and
    schedule, memory formats and compilation, random seeding per step and the hand-over to other
    tasks. Noise filters are attached by callbacks; without any, the step is the plain loss.

    Args:
        backbone: any timm model name, or ``conv4``.
        backbone_kwargs: passed to the backbone.
        in_channels: image bands (linked to the data by the command line).
        pretrained: load timm's weights.
        optimizer: optimiser settings.
        schedule: learning-rate schedule.
        channels_last: memory format of images and convolutions.
        compile_backbone: run ``torch.compile`` on the backbone.
        check_finite: stop with the batch indices when the loss is NaN or infinite.
        init_weights: file to start from, see :func:`lightning_nrml.models.load_weights`.
        stem: ``cifar`` = ResNets for small images, see :func:`lightning_nrml.models.create_backbone`.

    Attributes:
        made_anew: names of parts that ``init_weights`` leaves out: memories and teachers of another run.
    """

    made_anew: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        channels_last: bool = False,
        compile_backbone: bool = False,
        check_finite: bool = True,
        init_weights: str | None = None,
        stem: Stem = "imagenet",
    ) -> None:
        super().__init__()
        frame = inspect.currentframe()
        assert frame is not None
        # kept in checkpoints; not sent to loggers, to which the command line gives the whole config
        self.hparams.update(plain_arguments(frame))
        self.backbone, self.num_features = create_backbone(
            backbone, in_channels, pretrained, backbone_kwargs, stem
        )
        self.optimizer_config = as_config(OptimizerConfig, optimizer)
        self.schedule_config = as_config(ScheduleConfig, schedule)
        self.channels_last = channels_last
        self.compile_backbone = compile_backbone
        self.check_finite = check_finite
        self.init_weights = init_weights
        self.filters = FilterChain()
        self._pending: tuple[FilterContext, Selection] | None = None
        tolerate_absent_filters(self)

    # ---- what a method writes -------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Forward pass on one batch of this rank, without any filtering or logging."""
        raise NotImplementedError(f"{type(self).__name__} must implement step(batch) -> StepOutput.")

    def embed(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, embedding_dim)`` float32 rows of unit length, for retrieval and audits."""
        return F.normalize(self.backbone(x).float(), dim=1)

    def encoder(self) -> nn.Module:
        """Image to embedding (not normalised) as one net that shares the weights, for a teacher to copy."""
        return nn.Sequential(OrderedDict(backbone=self.backbone))

    def remember(self, ctx: FilterContext, selection: Selection) -> None:
        """Write the gathered global batch into the method's own memories, after the backward pass."""

    def loss_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that belong to the loss (class weights, proxies): their own learning rate."""
        return ()

    @property
    def embedding_dim(self) -> int:
        """Columns of ``embed``'s result and of ``StepOutput.embedding``."""
        return self.num_features

    @property
    def has_memory(self) -> bool:
        """Whether :meth:`remember` needs the gathered batch even when no filter runs."""
        return False

    # ---- training -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Apply memory format, compilation and DDP exemptions."""
        if self.channels_last:
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile_backbone and stage == "fit":
            self.backbone.compile()
        distributed.exempt_from_ddp_sync(self)

    def on_fit_start(self) -> None:
        """Apply start weights, unless the run resumes (Lightning does not know that in ``setup`` yet)."""
        if self.init_weights and self.trainer.ckpt_path is None:
            self.start_from(self.init_weights)

    def start_from(self, path: str) -> set[str]:
        """Read start weights, see :func:`.load_weights`; names of the state that the file gave."""
        return load_weights(self, path, made_anew=(*ATTACHED, *self.made_anew))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed by (seed, epoch, batch, rank): dropout is the same after a resume at any point."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:
            mixed = mix_seed(int(seed), self.current_epoch, batch_idx, distributed.rank())
            # torch.manual_seed would also queue a call, with its stack trace, for every absent device
            torch.default_generator.manual_seed(mixed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(mixed)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """step -> filters -> weighted loss -> log. Also returns what callbacks read."""
        batch = self._formatted(batch)
        out = self.step(batch)
        selection = self._select(out, batch)
        loss, parts = _loss(out, selection)
        self._log_losses({"loss": loss, **parts}, out)
        return {
            "loss": loss,
            "embedding": out.embedding.detach(),
            "label": out.label,
            "index": out.index,
            "selection": selection,
            "extras": out.extras,
        }

    def _log_losses(self, parts: Mapping[str, Tensor], out: StepOutput) -> None:
        """Log means over ranks; an infinite loss on any rank stops all of them, so that none hangs.

        So does a batch without a single finite embedding: a filter drops such rows, which would hide a
        diverged net behind a loss of 0.
        """
        rows = torch.isfinite(out.embedding.detach()).all(dim=-1)
        alive = rows.any().float() if len(rows) else torch.ones((), device=rows.device)
        losses = [v.detach().float() for v in parts.values()]
        *values, alive = distributed.mean_over_ranks(torch.stack([*losses, alive])).unbind()
        if self.check_finite and not bool(torch.isfinite(values[0]) & (alive > 0)):
            raise FloatingPointError(_nonfinite_message(values[0], out, self.global_step))
        for name, value in zip(parts, values, strict=True):
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=out.label.shape[0])

    def _select(self, out: StepOutput, batch: Batch) -> Selection | None:
        """This rank's decision, or None when no filter is on (bit-equal to the plain loss)."""
        filtering = any(self.filters.named_filters())
        if not filtering and not self.has_memory:
            return None
        ctx, rows = gathered_context(
            embedding=out.embedding,
            label=out.label,
            index=out.index,
            logits=None if out.logits is None else out.logits.detach(),
            per_sample_loss=None if out.per_sample_loss is None else out.per_sample_loss.detach(),
            proxies=out.proxies,
            teacher=self.filters.from_sources(batch).get("teacher"),
            epoch=self.current_epoch,
            step=self.global_step,
        )
        selection = self.filters.select(ctx) if filtering else Selection.keep_all(ctx.label)
        self._pending = (ctx, selection)
        return selection.rows(rows) if filtering else None

    def on_after_backward(self) -> None:
        """Memories are written only now: the graph of the loss may hold their old rows."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with torch.no_grad():
                self.remember(*pending)

    # ---- evaluation -----------------------------------------------------------------------------

    def predictions(self, x: Tensor) -> dict[str, Tensor]:
        """What evaluation and prediction steps return about images ``(B, C, H, W)``, beside their labels."""
        return {"embedding": self.embed(x)}

    def _embed_batch(self, batch: Batch) -> dict[str, Tensor]:
        batch = self._formatted(batch)
        out = {**self.predictions(batch["image"]), "index": batch["index"]}
        if "label" in batch:
            out["label"] = batch["label"]
        return out

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Embeddings, labels and indices, for the evaluation callbacks."""
        return self._embed_batch(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self._embed_batch(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self._embed_batch(batch)

    def forward(self, x: Tensor) -> Tensor:
        """Same as :meth:`embed`."""
        return self.embed(x)

    # ---- the rest -------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and per-step schedule from the two config dataclasses."""
        optimizer = create_optimizer(self.optimizer_config, self, self.loss_parameters())
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("The length of the run is unknown: set trainer.max_epochs or trainer.max_steps.")
        schedule = self.schedule_config
        if getattr(self.trainer, "fast_dev_run", False):  # a few steps, which no warm-up fits into
            schedule = replace(schedule, warmup_steps=0)
        scheduler = create_schedule(schedule, optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def to_backbone(self) -> nn.Module:
        """The backbone alone, as a plain timm model, for export."""
        return self.backbone

    def _formatted(self, batch: Batch) -> Batch:
        """Images in the weights' type (they differ for ``precision="bf16-true"``) and memory format."""
        image = batch["image"]
        if image.is_floating_point() and image.dtype is not self.dtype:
            image = image.to(self.dtype)
        if self.channels_last and image.ndim == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        return batch if image is batch["image"] else Batch(**{**batch, "image": image})  # type: ignore[typeddict-item]


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several counters (splitmix64 finaliser over each)."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def _loss(out: StepOutput, selection: Selection | None) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The scalar loss and its named parts."""
    weight = None if selection is None else selection.weight
    pair_weight = None if selection is None else selection.pair_weight
    if pair_weight is not None and out.pair_loss_fn is None:
        raise TypeError(
            "A noise filter selects pairs, but the loss of this module takes no pair weights: use "
            "ContrastiveLoss, or return a pair_loss_fn in StepOutput."
        )
    if out.loss_fn is not None or pair_weight is not None:
        if pair_weight is not None:
            assert out.pair_loss_fn is not None
            result = out.pair_loss_fn(weight, pair_weight)
        else:
            assert out.loss_fn is not None
            result = out.loss_fn(weight)
        if isinstance(result, Tensor):
            return result, {}
        parts = dict(result)
        return parts.pop("loss"), parts
    if out.per_sample_loss is None:
        raise TypeError("StepOutput needs a loss_fn or a per_sample_loss: step() returned neither.")
    if weight is None:
        return out.per_sample_loss.mean(), {}
    weight = torch.where(weight > 0, weight, 0.0)  # NaN is dropped, too
    kept = torch.where(weight > 0, out.per_sample_loss, out.per_sample_loss.detach().new_zeros(()))
    total = distributed.mean_over_ranks(weight.sum()).clamp_min(torch.finfo(torch.float32).tiny)
    return (kept * weight).sum() / total, {}


def _nonfinite_message(loss: Tensor, out: StepOutput, step: int) -> str:
    index, sizes = distributed.gather_ragged(out.index)
    finite = distributed.gather(torch.isfinite(out.embedding.detach()).all(dim=-1), sizes=sizes)
    bad = index[~finite].tolist()
    if bad:
        where = f"embeddings are not finite for dataset indices {bad[:20]}"
    else:
        where = f"all embeddings are finite; the batch holds dataset indices {index.tolist()[:20]}"
    return (
        f"The loss is {float(loss)} at step {step}: {where}. "
        "Look at these samples, lower the learning rate, or use fp32."
    )
