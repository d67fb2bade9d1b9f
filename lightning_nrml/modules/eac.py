"""EAC: classification that does not learn wrong labels by heart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml.losses import EACLoss
from lightning_nrml.metrics import TopKAccuracy
from lightning_nrml.modules.classifier import Classifier
from lightning_nrml.types import Batch, StepOutput


class EAC(Classifier):
    """EAC, "Learn From All: Erasing Attention Consistency for Noisy Label Facial Expression Recognition".

    A classifier on the pooled feature maps of a convolutional backbone. Cross-entropy acts on the image, and
    the class attention maps of image and mirror image, each erased at random, must agree. No sample is
    dropped, and nothing is remembered over steps. Source: Zhang et al., ECCV 2022, arXiv 2207.10299; see
    :class:`~lightning_nrml.losses.EACLoss`.

    Needs two views, the second one mirrored (:class:`~lightning_nrml.data.views.EACViews`); each passes the
    net on its own, so batch norm sees each view alone, as in the official code. Not for classes that a mirror
    changes, such as writing. Noise filters work here too (``logits``, ``per_sample_loss`` and ``proxies``).

    The embedding is the pooled features. Evaluation logs ``val/top1`` (``test/top1``) where the classes are
    those of training; for unseen ones there is :class:`~lightning_nrml.callbacks.RetrievalEvaluator`.

    Args:
        backbone: see :class:`EmbeddingModule`, as are all arguments not listed here; it must give feature
            maps ``(B, D, h, w)``, as ResNets and ``conv4`` do.
        num_classes: number of classes L (linked to the data by the command line).
        lam: weight of the consistency; 5 in the paper, for a pretrained ResNet. It belongs to the scale of
            the features: small nets from random weights want less (0.5), or they do not learn.

    Raises:
        ValueError: ``num_classes`` is missing or below 2, or the backbone gives no feature maps.
    """

    score_key = "probability"

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        num_classes: int | None = None,
        lam: float = 5.0,
        **kwargs: Any,
    ) -> None:
        if num_classes is None or num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: give the number of classes, 2 or more.")
        super().__init__(backbone, backbone_kwargs, in_channels, pretrained, **kwargs)
        self.num_classes = num_classes
        self.num_features = map_channels(self.backbone, in_channels, backbone)
        self.classifier = nn.Linear(self.num_features, num_classes)
        self.loss = EACLoss(lam)
        self.accuracy = TopKAccuracy(ks=(1,))

    def setup(self, stage: str) -> None:
        """As the base; what is compiled is the pass that this method uses."""
        super().setup(stage)
        if self.compile_backbone and stage == "fit":
            backbone: Any = self.backbone
            backbone.forward_features = torch.compile(backbone.forward_features)

    def maps(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, D, h, w)`` features before pooling."""
        out: Tensor = self.backbone.forward_features(x)  # type: ignore[operator]
        return out

    def embed(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, D)`` unit rows of pooled features."""
        return F.normalize(self.maps(x).float().mean(dim=(2, 3)), dim=1)

    def step(self, batch: Batch) -> StepOutput:
        """Classify the image; compare its attention with the mirror image's."""
        views = batch.get("views", [])
        if len(views) != 2:
            raise ValueError(
                f"EAC needs two views of each image, the second one mirrored, but the batch holds "
                f"{max(len(views), 1)}: set data.init_args.train_view to EACViews."
            )
        maps, mirrored = (self.maps(self._as_weights(view)) for view in views)
        features, label = maps.mean(dim=(2, 3)), batch["label"]
        logits = self.classifier(features)

        def loss_fn(weight: Tensor | None) -> dict[str, Tensor]:
            total, entropy, attention = self.loss.terms(
                logits, label, maps, mirrored, self.classifier.weight, weight
            )
            return {"loss": total, "cross_entropy": entropy, "attention": attention}

        per_sample = F.cross_entropy(logits.detach().float(), label, reduction="none")
        return StepOutput(
            features,
            label,
            batch["index"],
            logits=logits,
            loss_fn=loss_fn,
            per_sample_loss=per_sample,
            proxies=self.classifier.weight,
        )

    def _as_weights(self, view: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return view.to(dtype=self.dtype, memory_format=layout)  # type: ignore[arg-type]

    # ---- evaluation -----------------------------------------------------------------------------

    def predictions(self, x: Tensor) -> dict[str, Tensor]:
        """``embedding (B, D)`` of unit rows and ``probability (B, L)``."""
        features = self.maps(x).mean(dim=(2, 3))
        probability = self.classifier(features).float().softmax(dim=1)
        return {"embedding": F.normalize(features.float(), dim=1), "probability": probability}

    @property
    def knows_classes(self) -> bool:
        """Not so on a split by classes."""
        splits = getattr(getattr(self.trainer, "datamodule", None), "splits", None)
        return not getattr(splits, "zero_shot", False)


def map_channels(backbone: nn.Module, in_channels: int, name: str) -> int:
    """``D`` of the feature maps ``(B, D, h, w)`` of a backbone.

    Raises:
        ValueError: it gives no such maps.
    """
    function = getattr(backbone, "forward_features", None)
    training = backbone.training
    backbone.eval()  # statistics of batch norm stay as they are
    try:
        with torch.no_grad():
            out = function(torch.zeros(1, in_channels, 64, 64)) if callable(function) else None
    except (RuntimeError, AssertionError, ValueError):  # a ViT of another image size
        out = None
    backbone.train(training)
    if not isinstance(out, Tensor) or out.ndim != 4:
        raise ValueError(
            f"EAC needs a backbone with feature maps (B, D, h, w), which '{name}' does not give: choose a "
            "convolutional net such as resnet18."
        )
    return out.shape[1]
