"""Multi-label classification with losses that stand label noise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml.losses import (
    MultiLabelASLLoss,
    MultiLabelBCELoss,
    MultiLabelELRLoss,
    MultiLabelLoss,
    MultiLabelSATLoss,
)
from lightning_nrml.losses.multilabel_targets import TargetLoss
from lightning_nrml.modules.base import EmbeddingModule
from lightning_nrml.types import Batch, StepOutput

LossName = Literal["bce", "elr", "sat", "asl"]
_LOSSES: dict[str, type[MultiLabelLoss]] = {
    "bce": MultiLabelBCELoss,
    "elr": MultiLabelELRLoss,
    "sat": MultiLabelSATLoss,
    "asl": MultiLabelASLLoss,
}


class MultiLabelModule(EmbeddingModule):
    """What the multi-label methods share: a linear classifier on the backbone, and probabilities.

    The embedding is the backbone's features. Evaluation and prediction steps also return ``probability``
    ``(B, L)``, which :class:`~lightning_nrml.callbacks.MultiLabelEvaluator` reads.

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        num_classes: number of labels L (linked to the data by the command line).

    Raises:
        ValueError: ``num_classes`` is missing or below 1.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_classes is None or num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: give the number of labels, 1 or more.")
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, **kwargs)
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes)

    def predictions(self, x: Tensor) -> dict[str, Tensor]:
        """``embedding (B, D)`` of unit rows and ``probability (B, L)``."""
        features = self.backbone(x)
        logits = self.classifier(features).float()
        return {"embedding": F.normalize(features.float(), dim=1), "probability": logits.sigmoid()}


class MultiLabel(MultiLabelModule):
    """One network with a multi-label loss: BCE, ELR, SAT or the asymmetric loss.

    ELR and SAT remember a soft target for every label of every training sample; the memory is sized by the
    datamodule at the start of a fit, is part of the checkpoint and equal on all ranks.

    Args:
        backbone: see :class:`MultiLabelModule`, as are all arguments not listed here.
        num_classes: number of labels L (linked to the data by the command line).
        loss: ``bce`` (no defence), ``elr``, ``sat`` or ``asl``.
        loss_kwargs: arguments of the loss: ``lam``, ``beta``, ``symmetric`` of
            :class:`~lightning_nrml.losses.MultiLabelELRLoss`; ``momentum``, ``warmup_epochs`` of
            :class:`~lightning_nrml.losses.MultiLabelSATLoss`; ``gamma_neg``, ``gamma_pos``, ``clip`` of
            :class:`~lightning_nrml.losses.MultiLabelASLLoss`.
    """

    made_anew: ClassVar[tuple[str, ...]] = ("loss",)  # all that these losses hold are targets of one run

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        num_classes: int | None = None,
        loss: LossName = "bce",
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, num_classes, **kwargs)
        self.loss = make_loss(loss, self.num_classes, loss_kwargs or {})

    def setup(self, stage: str) -> None:
        """Size the loss's memory, before a checkpoint is restored."""
        super().setup(stage)
        if stage == "fit" and isinstance(self.loss, TargetLoss):
            self.loss.allocate(num_train_samples(self))

    def step(self, batch: Batch) -> StepOutput:
        """Classify the batch; the loss is evaluated after the filters have spoken."""
        features, label, index = self.backbone(batch["image"]), batch["label"], batch["index"]
        logits = self.classifier(features)

        def loss_fn(weight: Tensor | None) -> Tensor:
            loss: Tensor = self.loss(logits, label, index, weight, self.current_epoch)
            return loss

        return StepOutput(features, label, index, logits=logits, loss_fn=loss_fn)


def make_loss(name: str, num_labels: int, arguments: Mapping[str, Any]) -> MultiLabelLoss:
    """The loss of a name; a memory gets its rows later.

    Raises:
        ValueError: unknown name or argument.
    """
    if name not in _LOSSES:
        raise ValueError(f"loss is '{name}': choose one of {', '.join(_LOSSES)}.")
    cls = _LOSSES[name]
    known = [n for n in inspect.signature(cls).parameters if n not in ("num_samples", "num_labels")]
    unknown = [n for n in arguments if n not in known]
    if unknown:
        accepted = ", ".join(known) or "no argument"
        raise ValueError(
            f"loss_kwargs: '{unknown[0]}' is no argument of loss '{name}', which takes {accepted}."
        )
    sizes = {"num_samples": 0, "num_labels": num_labels} if issubclass(cls, TargetLoss) else {}
    return cls(**sizes, **arguments)


def num_train_samples(module: EmbeddingModule) -> int:
    """Size of the training set of the running fit.

    Raises:
        ValueError: there is no datamodule that tells.
    """
    count = getattr(getattr(module.trainer, "datamodule", None), "num_train_samples", None)
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            f"{type(module).__name__} remembers every training sample and needs a datamodule with the int "
            "attribute `num_train_samples` (all datamodules of lightning_nrml have it)."
        )
    return count
