"""What the self-supervised methods share: several views of a batch, and a momentum teacher."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nrml import distributed
from lightning_nrml.models import MomentumTeacher, cosine_tau
from lightning_nrml.modules.base import EmbeddingModule
from lightning_nrml.types import Batch, Selection, StepOutput


class SelfSupervised(EmbeddingModule):
    """Base of the methods that learn from several views of each image, without labels.

    ``step`` reads ``batch["views"]``; ``embed`` gives the normalised features of the backbone, which are
    also what noise filters and callbacks see (``StepOutput.embedding``, of the first view). Projectors,
    teachers and queues serve training only. Labels are not used for learning.

    Arguments are those of :class:`EmbeddingModule`.
    """

    _keep: Tensor | None = None

    def _select(self, out: StepOutput, batch: Batch) -> Selection | None:
        selection = super()._select(out, batch)
        self._keep = None if selection is None else selection.keep
        return selection

    def kept_rows(self) -> Tensor | None:
        """``(W B,)`` bool, the images of this step's gathered batch that the filters keep; None = all."""
        return None if self._keep is None else distributed.gather(self._keep)

    def views(self, batch: Batch, at_least: int = 2) -> list[Tensor]:
        """The views of a batch, each ``(B, C, h, w)``.

        Raises:
            ValueError: the batch holds fewer views than the method needs.
        """
        views = batch.get("views", [batch["image"]])
        if len(views) < at_least:
            raise ValueError(
                f"{type(self).__name__} needs {at_least} views of each image, but the batch holds "
                f"{len(views)}: set data.init_args.train_view to a class with several views, such as "
                "SimCLRViews, MoCoViews, BYOLViews or MultiCropViews."
            )
        return views

    def features(self, views: list[Tensor], joint: bool) -> list[Tensor]:
        """Backbone features ``(B, num_features)`` of each view.

        Args:
            views: images of one size.
            joint: one pass over the concatenation, so that batch norm takes its statistics over all views;
                otherwise one pass and one set of statistics per view.

        Raises:
            ValueError: the backbone does not take images of this size.
        """
        try:
            if not joint:
                return [self.backbone(view) for view in views]
            return list(self.backbone(torch.cat(views)).split([len(view) for view in views]))
        except AssertionError as error:  # timm's way to say it
            height, width = views[0].shape[-2:]
            raise ValueError(
                f"The backbone does not take views of {height} x {width} pixels ({str(error).rstrip('.')}): "
                f"a ViT needs backbone_kwargs: {{img_size: {height}}}, and for views of several sizes "
                "{dynamic_img_size: true}."
            ) from error

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """As the base.

        Raises:
            ValueError: too few images in a pass for a batch norm.
        """
        try:
            return super().training_step(batch, batch_idx)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            images = len(batch["image"])
            more = "" if images == 1 else ", or lower model.init_args.bn_splits"
            raise ValueError(
                f"The batch norms of {type(self).__name__} need more than 1 image in a pass, but the batch "
                f"of each process holds {images}: raise data.init_args.batch_size{more}."
            ) from error

    def warn_if_never(self, argument: str, epoch: int, what: str) -> None:
        """Tell, when training starts, that ``argument`` lets something begin only after the last epoch.

        Args:
            argument: name of the setting.
            epoch: its value, the first epoch of what it begins.
            what: what the run does without it, after the name of the method.
        """
        trainer = self.trainer
        batches = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        epochs = math.ceil(trainer.estimated_stepping_batches / max(batches, 1))
        if epoch >= epochs:
            rank_zero_warn(
                f"{type(self).__name__} {what} in this run: {argument} is {epoch} and the run has "
                f"{epochs} epoch{'s' if epochs > 1 else ''}, so lower model.init_args.{argument} or train "
                "longer."
            )

    def start_over(self) -> None:
        """Make everything that was derived from the start weights fit new ones (``init_weights``)."""

    def after_optimizer_step(self) -> None:
        """Runs right after the weights have moved, while ``global_step`` still counts the steps before."""

    def on_fit_start(self) -> None:
        """As the base; teachers and queues follow ``init_weights``."""
        super().on_fit_start()
        if self.init_weights and self.trainer.ckpt_path is None:
            self.start_over()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Any = None,
    ) -> None:
        """As the base, then :meth:`after_optimizer_step`.

        This hook runs once per optimiser step, also under gradient accumulation, and before the
        ``on_train_batch_end`` in which checkpoints are written: a resumed run starts from the updated
        teacher.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_optimizer_step()

    def _formatted(self, batch: Batch) -> Batch:
        batch = super()._formatted(batch)
        if "views" not in batch:
            return batch
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        views = [view.to(dtype=self.dtype, memory_format=layout) for view in batch["views"]]  # type: ignore[arg-type]
        return Batch(**{**batch, "views": views})  # type: ignore[typeddict-item]


class TaughtModule(SelfSupervised):
    """Base of the methods with a momentum teacher: :attr:`teacher` follows ``backbone -> projector``.

    The teacher moves after every optimiser step k (from 0) by :class:`.MomentumTeacher` with momentum
    ``tau``; for MoCo, whose code moves it before the next forward pass, that is the same sequence.

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        tau: momentum of the teacher at the start.
        tau_schedule: ``cosine`` (to 1 at the last step) or ``constant``.
    """

    made_anew: ClassVar[tuple[str, ...]] = ("teacher",)
    projector: nn.Module
    teacher: MomentumTeacher

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        tau: float = 0.996,
        tau_schedule: Literal["cosine", "constant"] = "cosine",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, **kwargs)
        if tau_schedule not in ("cosine", "constant"):
            raise ValueError(f"tau_schedule must be 'cosine' or 'constant', got '{tau_schedule}'.")
        cosine_tau(0, 1, tau)  # checks the range before a long start-up
        self.tau, self.tau_schedule = tau, tau_schedule
        self._max_steps = 1

    @property
    def student(self) -> nn.Module:
        """The net that the teacher copies: image -> projection."""
        return nn.Sequential(self.backbone, self.projector)

    @property
    def current_tau(self) -> float:
        """Momentum of the next update of the teacher."""
        if self.tau_schedule == "constant":
            return self.tau
        return cosine_tau(self.global_step, self._max_steps, self.tau)

    def start_over(self) -> None:
        """The teacher starts from the loaded weights."""
        self.teacher.reset(self.student)

    def setup(self, stage: str) -> None:
        """As the base; the teacher takes the same memory format."""
        super().setup(stage)
        if self.channels_last:
            self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def on_train_start(self) -> None:
        """Learn the length of the run, for the cosine of ``tau``."""
        super().on_train_start()
        self._max_steps = max(int(self.trainer.estimated_stepping_batches), 1)

    def after_optimizer_step(self) -> None:
        """Move the teacher."""
        self.teacher.update(self.student, self.current_tau)
