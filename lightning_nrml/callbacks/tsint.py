"""T-SINT in a run: the pair filter and its teacher."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_nrml import distributed, filters
from lightning_nrml.callbacks.attached import chain_of
from lightning_nrml.callbacks.noise_filter import NoiseFilterCallback
from lightning_nrml.callbacks.run_sizes import RunSizes
from lightning_nrml.models import MomentumTeacher, load_weights
from lightning_nrml.types import Selection


class TSINT(NoiseFilterCallback):
    """Leaves out the pairs of a batch on which a teacher does not agree.

    Ibrahimi et al., WACV 2022, arXiv 2112.10453; see :class:`lightning_nrml.filters.TSINT` for what is our
    reading. The teacher starts as the student (give that good start weights) and follows it by an
    exponential moving average after each optimiser step, batch-norm statistics copied; it sees the same
    views, in eval mode. The module needs an ``encoder()``, as all of ours have, and a loss that takes
    pairs, such as ContrastiveLoss; a cross-batch memory would bring the dropped pairs back and is refused.

    Logged besides the usual keys: ``tsint/keep_positive``, ``tsint/cut_positive`` and, where the truth is
    known, ``noise/pair_precision``, the share of right ones among the kept positive pairs.

    Args:
        noise_rate: assumed share of wrong labels, in [0, 1); sets the shares below.
        keep_positive: share of the positive pairs to keep; default: as many as should be right.
        drop_negative: share of the negative pairs to drop; default: as many as should be wrong.
        cut_momentum: of the running distance cuts, in [0, 1).
        teacher_momentum: of the teacher, in [0, 1].
        teacher_weights: a frozen teacher from this file instead (see ``init_weights`` of the module).
        kwargs: schedule, see :class:`NoiseFilterCallback`.
    """

    def __init__(
        self,
        noise_rate: float = 0.5,
        keep_positive: float | None = None,
        drop_negative: float | None = None,
        cut_momentum: float = 0.9,
        teacher_momentum: float = 0.999,
        teacher_weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(filter=None, **kwargs)
        if not 0 <= teacher_momentum <= 1:
            raise ValueError(f"teacher_momentum must lie in [0, 1], got {teacher_momentum}.")
        if self.granularity != "batch":
            raise ValueError("TSINT selects pairs of a batch; use granularity='batch' with it.")
        self.options: dict[str, Any] = {
            "noise_rate": noise_rate,
            "keep_positive": keep_positive,
            "drop_negative": drop_negative,
            "momentum": cut_momentum,
        }
        self.teacher_momentum = 1.0 if teacher_weights else teacher_momentum
        self.teacher_weights = teacher_weights
        self._steps_done = 0

    def make_filter(self, sizes: RunSizes) -> filters.NoiseFilter:
        """Tell the filter the number of classes."""
        return filters.TSINT(sizes.num_classes, **self.options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the teacher, too."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if getattr(pl_module, "has_memory", False):
            raise ValueError(
                "TSINT selects pairs within the batch, and the cross-batch memory would bring the others "
                "back: set memory_size to 0."
            )
        if not callable(getattr(pl_module, "encoder", None)):
            raise TypeError(
                f"TSINT needs a method encoder() of {type(pl_module).__name__} that returns the net from "
                "image to embedding, for the teacher to copy."
            )
        teacher = MomentumTeacher(_student(pl_module))
        pl_module.filter_teacher = teacher

        def embed(batch: Any) -> Tensor:
            teacher.eval()  # Lightning puts the whole module into training mode
            rows: Tensor = teacher(batch["image"])
            return rows

        chain_of(pl_module).sources["teacher"] = embed

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the teacher behind as well."""
        super().detach(trainer, pl_module)
        chain_of(pl_module).sources.pop("teacher", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start as the student, which has its start weights only now; a resumed teacher is restored."""
        super().on_train_start(trainer, pl_module)
        self._steps_done = trainer.global_step
        if trainer.ckpt_path is None:
            teacher = cast(MomentumTeacher, pl_module.filter_teacher)
            teacher.reset(_student(pl_module))
            if self.teacher_weights:
                load_weights(teacher.module, self.teacher_weights)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the teacher follow, once per optimiser step."""
        if trainer.global_step > self._steps_done and self.teacher_momentum < 1:
            follow(
                cast(MomentumTeacher, pl_module.filter_teacher), _student(pl_module), self.teacher_momentum
            )
        self._steps_done = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: Tensor, selection: Selection
    ) -> None:
        super()._log(trainer, pl_module, batch, index, selection)
        for key in ("keep_positive", "cut_positive"):
            value = selection.stats.get(f"{self.name}/{key}")
            if value is not None:
                pl_module.log(f"{self.name}/{key}", value, batch_size=len(index))
        clean = batch.get("clean_label") if isinstance(batch, dict) else None
        if clean is None or selection.pair_weight is None:
            return
        sizes = distributed.gather_sizes(len(clean), clean.device)
        clean, label = (distributed.gather(x, sizes=sizes) for x in (clean, batch["label"]))
        kept = (label.unsqueeze(1) == label) & (selection.pair_weight > 0)
        kept.fill_diagonal_(False)
        right = kept & (clean.unsqueeze(1) == clean)
        if bool(kept.any()):
            share = right.sum() / kept.sum()
            pl_module.log("noise/pair_precision", share, on_step=False, on_epoch=True, batch_size=len(index))


def _student(pl_module: LightningModule) -> nn.Module:
    encoder: nn.Module = pl_module.encoder()  # type: ignore[operator]
    return encoder


@torch.no_grad()
def follow(teacher: MomentumTeacher, student: nn.Module, momentum: float) -> None:
    """``teacher <- momentum teacher + (1 - momentum) student`` for parameters; buffers are copied."""
    teacher.update(student, momentum)
    for mine, theirs in zip(teacher.module.buffers(), student.buffers(), strict=True):
        mine.copy_(theirs)
