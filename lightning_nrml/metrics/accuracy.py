"""Top-k accuracy over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TopKAccuracy(Metric):
    """Share of rows whose label is among the k best-scored classes.

    Of equal scores the lower column goes first. Rows with a negative label are left out, and every
    rank may hold any number of rows, also none.

    Args:
        ks: the k; those that are not below the number of classes (where every answer is right) are
            left out of the result.
        kwargs: further arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    hits: Tensor
    rows: Tensor
    classes: Tensor

    def __init__(self, ks: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ks or min(ks) < 1:
            raise ValueError(f"ks is {list(ks)}: give at least one k, each 1 or more.")
        self.ks = tuple(ks)
        self.add_state("hits", default=torch.zeros(len(self.ks), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("rows", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("classes", default=torch.tensor(0), dist_reduce_fx="max")

    def update(self, score: Tensor, label: Tensor) -> None:
        """Add rows.

        Args:
            score: ``(B, C)`` logits or probabilities; -inf never counts as an answer.
            label: ``(B,)`` int64 columns of ``score``; negative = not counted.
        """
        if score.ndim != 2 or label.shape != score.shape[:1]:
            raise ValueError(
                f"score must be (B, C) and label (B,), got {tuple(score.shape)} and {tuple(label.shape)}."
            )
        if len(label) and int(label.max()) >= score.shape[1]:
            raise ValueError(
                f"label {int(label.max())} is not one of the {score.shape[1]} scored classes: evaluate on "
                "the classes that were trained."
            )
        score, label = score[label >= 0], label[label >= 0]
        own = score.gather(1, label[:, None])
        column = torch.arange(score.shape[1], device=score.device)
        ahead = (score > own) | ((score == own) & (column < label[:, None]))
        place = torch.where(own[:, 0] > -torch.inf, ahead.sum(dim=1), score.shape[1])
        ks = torch.tensor(self.ks, device=score.device)
        self.hits += (place[:, None] < ks).sum(dim=0)
        self.rows += len(label)
        self.classes.fill_(score.shape[1])

    def compute(self) -> dict[str, float]:
        """``{"top1": ..., "top5": ...}`` in [0, 1]; empty if there was no row."""
        rows, classes = int(self.rows), int(self.classes)
        pairs = zip(self.ks, self.hits.tolist(), strict=True)
        return {f"top{k}": hits / rows for k, hits in pairs if rows and k < classes}
