"""MoCHi: MoCo with harder negatives, mixed in embedding space."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_nrml.losses import MoCHiLoss
from lightning_nrml.modules.moco import MoCo


class MoCHi(MoCo):
    """MoCHi, "Hard Negative Mixing for Contrastive Learning".

    MoCo whose logits gain, per query, ``num_mixed`` mixtures of two of its ``num_hard`` hardest negatives
    and ``num_query_mixed`` mixtures of one of them with the query itself; no gradient flows through a
    mixture. Written MoCHi(N, s, s'). Source: Kalantidis et al., NeurIPS 2020, arXiv 2010.01028, section 4.

    Args:
        backbone: see :class:`MoCo`, as are all arguments not listed here.
        temperature: of the logits.
        queue_size: keys kept.
        num_hard: N, negatives that may be mixed; at most ``queue_size``.
        num_mixed: s, mixtures of two negatives.
        num_query_mixed: s', mixtures of the query and a negative.
        warmup_epochs: epochs of plain MoCo before mixing begins.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        temperature: float = 0.2,
        queue_size: int = 16384,
        num_hard: int = 1024,
        num_mixed: int = 1024,
        num_query_mixed: int = 128,
        warmup_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone, backbone_kwargs, in_channels, pretrained, temperature, queue_size, **kwargs
        )
        if num_hard > queue_size:
            raise ValueError(
                f"num_hard is {num_hard}, more than the {queue_size} keys of the queue: lower it, or raise "
                "queue_size."
            )
        self.mixed_loss = MoCHiLoss(temperature, num_hard, num_mixed, num_query_mixed)
        self.warmup_epochs = warmup_epochs

    def on_train_start(self) -> None:
        """As the base; tells if the run is over before the warm-up."""
        super().on_train_start()
        self.warn_if_never("warmup_epochs", self.warmup_epochs, "mixes no negatives and is MoCo")

    def contrast(self, q: Tensor, k: Tensor, queue: Tensor, weight: Tensor | None) -> Tensor:
        """MoCo's loss during the warm-up, then the one with mixed negatives."""
        loss = self.loss if self.current_epoch < self.warmup_epochs else self.mixed_loss
        return loss(q, k, queue, weight=weight)
