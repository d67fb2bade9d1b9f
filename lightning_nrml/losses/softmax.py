"""Cross-entropy over cosines to one learned direction per class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml import distributed
from lightning_nrml.losses.base import Loss, full_precision, prepare, safe_divide, size_of, unit_rows


class CosineSoftmaxLoss(Loss):
    """Normalised softmax: ``-log softmax(scale * cos(z, W))[label]``, weighted mean over the batch.

    Under label noise on natural images with few classes it is the rival to beat: its embedding resists
    wrong labels, and its logits serve filters (BARE) and audits.

    Source: NormFace, Wang et al., ACM MM 2017, arXiv 1704.06369; Zhai & Wu, "Classification is a Strong
    Baseline for Deep Metric Learning", BMVC 2019, arXiv 1811.12649.

    Args:
        num_classes: number of classes C; labels are in ``[0, C)`` (those of dropped rows may be anything).
            ``None``: those of the module that takes the loss.
        embedding_dim: values per embedding D; ``None``: those of the module.
        scale: inverse temperature, > 0.

    Attributes:
        class_weight: parameter ``(C, D)``; only the direction of its rows counts.

    Raises:
        ValueError: if a size is below 1 or ``scale`` is not positive.
    """

    class_weight: nn.Parameter

    def __init__(
        self, num_classes: int | None = None, embedding_dim: int | None = None, scale: float = 16.0
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
            if value is not None and value < 1:
                raise ValueError(f"'{name}' must be at least 1, got {value}.")
        if scale <= 0:
            raise ValueError(f"'scale' must be positive, got {scale}.")
        self.num_classes, self.embedding_dim, self.scale = num_classes, embedding_dim, scale
        self.register_parameter("class_weight", None)
        if num_classes is not None and embedding_dim is not None:
            self.set_sizes(num_classes, embedding_dim)

    def set_sizes(self, num_classes: int | None, embedding_dim: int) -> None:
        """See :meth:`Loss.set_sizes`; draws the class weights. It may have been given classes to spare."""
        own, name = self.num_classes, type(self).__name__
        enough = own is None or num_classes is None or own >= num_classes
        self.num_classes = size_of(name, "num_classes", own, num_classes, enough)
        same = self.embedding_dim == embedding_dim
        self.embedding_dim = size_of(name, "embedding_dim", self.embedding_dim, embedding_dim, same)
        if self.class_weight is None:
            self.class_weight = nn.Parameter(torch.empty(self.num_classes, self.embedding_dim))
            nn.init.normal_(self.class_weight, std=self.embedding_dim**-0.5)  # rows of length about 1

    def logits(self, embedding: Tensor) -> Tensor:
        """``(B, C)`` scaled cosines, in fp32 or wider."""
        if self.class_weight is None:
            raise ValueError(f"{type(self).__name__} was given no sizes: name num_classes and embedding_dim.")
        with full_precision(embedding):
            z, centers = unit_rows(embedding), unit_rows(self.class_weight)
            dtype = torch.promote_types(z.dtype, centers.dtype)
            return self.scale * (z.to(dtype) @ centers.to(dtype).T)

    def _checked(self, label: Tensor) -> Tensor:
        # on the CPU only: looking would make a GPU wait, which has its own assertion
        count = len(self.class_weight)
        outside = (label < 0) | (label >= count)
        if label.is_cpu and outside.any():
            raise ValueError(
                f"labels must lie in [0, {count - 1}] (num_classes = {count}), got "
                f"{int(label[outside][0])} in row {int(outside.nonzero()[0])}."
            )
        return label

    def forward(self, embedding: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """See :class:`~lightning_nrml.losses.base.Loss`; no gathering is needed but for the weight sum.

        Raises:
            ValueError: the label of a row with weight is out of range (checked on the CPU only).
        """
        with full_precision(embedding):
            z, w = prepare(embedding, label, weight)
            target = label if weight is None else label.masked_fill(w == 0, 0)
            terms = F.cross_entropy(self.logits(z), self._checked(target), reduction="none")
            total = (w * terms).sum()
            return safe_divide(total, distributed.mean_over_ranks(w.sum()))

    @torch.no_grad()
    def per_sample(self, embedding: Tensor, label: Tensor) -> Tensor:
        """``(B,)`` cross-entropies, see :meth:`Loss.per_sample`."""
        with full_precision(embedding):
            return F.cross_entropy(self.logits(embedding), self._checked(label), reduction="none").float()

    def proxies(self) -> Tensor:
        """``(C, D)`` class weights."""
        return self.class_weight

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"num_classes={self.num_classes}, scale={self.scale}"
