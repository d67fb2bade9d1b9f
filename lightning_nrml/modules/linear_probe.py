"""Linear evaluation of a frozen backbone."""

from __future__ import annotations

from typing import Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml.metrics import TopKAccuracy
from lightning_nrml.modules.classifier import Classifier
from lightning_nrml.optim import OptimizerConfig, ScheduleConfig
from lightning_nrml.types import Batch, StepOutput


class LinearProbe(Classifier):
    """A zero-initialised linear classifier on the pooled features of a frozen backbone.

    The protocol of SimCLR (Chen et al., ICML 2020, appendix B.6, and the official code): the backbone is
    in inference mode throughout, batch norms included; features are the backbone's own, neither
    projected nor normalised; training views crop and flip only; SGD with Nesterov momentum 0.9, cosine
    schedule without warm-up, rate 0.1 x batch / 256, weight decay 0 (CIFAR) or 1e-6, 90-100 epochs.
    Logs ``val/probe_top1`` (and ``val/probe_top5`` above five classes). Report the last epoch: the best
    one is chosen on the labels that are measured.

    This protocol favours backbones whose features happen to have the scale that suits the rate. To compare
    backbones of different scales, ``batch_norm`` standardises the features first, as is also usual (He et
    al., "Masked Autoencoders", CVPR 2022, arXiv 2111.06377, appendix A.1).

    Noise filters work here too (``logits`` and ``per_sample_loss`` are given).

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here.
        num_classes: classes (linked to the data by the command line).
        optimizer: default as above for a batch of 256, without weight decay.
        schedule: default as above.
        init_weights: what to evaluate: a checkpoint of any module of this package with the same backbone,
            or a saved backbone. Without it (and without ``pretrained``) a random backbone is measured.
        batch_norm: a batch norm without scale and offset between backbone and classifier.
    """

    score_key = "logits"
    accuracy_prefix = "probe_"

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        num_classes: int = 10,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        init_weights: str | None = None,
        batch_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        optimizer = optimizer or OptimizerConfig("sgd", lr=0.1, weight_decay=0.0)
        schedule = schedule or ScheduleConfig("cosine", warmup_steps=0)
        super().__init__(
            backbone,
            backbone_kwargs,
            in_channels,
            pretrained,
            optimizer=optimizer,
            schedule=schedule,
            init_weights=init_weights,
            **kwargs,
        )
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: a classifier needs 2 or more.")
        self.pretrained = pretrained
        self.num_classes = num_classes
        self.backbone.requires_grad_(False)
        self.norm = nn.BatchNorm1d(self.num_features, affine=False) if batch_norm else nn.Identity()
        self.linear = nn.Linear(self.num_features, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.accuracy = TopKAccuracy()
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As usual for the classifier; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def on_fit_start(self) -> None:
        """As the base class; says so if there is nothing to evaluate."""
        super().on_fit_start()
        if not (self.init_weights or self.pretrained or self.trainer.ckpt_path):
            rank_zero_warn(
                "LinearProbe measures a random backbone: set init_weights to a checkpoint, or pretrained."
            )

    def features(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, num_features)`` frozen features."""
        with torch.no_grad():
            out: Tensor = self.backbone(x)
        return out

    def step(self, batch: Batch) -> StepOutput:
        """Cross-entropy per sample of the classifier on frozen features."""
        h = self.features(batch["image"])
        logits = self.linear(self.norm(h))
        loss = F.cross_entropy(logits.float(), batch["label"], reduction="none")
        return StepOutput(h, batch["label"], batch["index"], logits=logits, per_sample_loss=loss)

    def predictions(self, x: Tensor) -> dict[str, Tensor]:
        """``embedding (B, D)`` of unit rows and ``logits (B, L)``."""
        h = self.features(x)
        return {"embedding": F.normalize(h.float(), dim=1), "logits": self.linear(self.norm(h))}
