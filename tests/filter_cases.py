"""Every filter in a small setting, and batches to try it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from lightning_nrml.filters import (
    BARE,
    PRISM,
    TSINT,
    Consensus,
    FixedFilter,
    KNNVote,
    LossQuantile,
    MultiLabelPRISM,
    NoiseFilter,
    SmallLoss,
)
from lightning_nrml.types import FilterContext

CLASSES, DIM, ROWS, STEPS = 4, 6, 24, 5
FILTERS: dict[str, Callable[[], NoiseFilter]] = {
    "prism_avg": lambda: PRISM(CLASSES, DIM, 0.4, 200, window=3),
    "prism_vmf": lambda: PRISM(CLASSES, DIM, 0.4, 200, window=3, similarity="vmf", shared_kappa=True),
    "prism_proxy": lambda: PRISM(CLASSES, DIM, 0.4, window=3, similarity="proxy"),
    "bare": lambda: BARE(),
    "bare_centers": lambda: BARE(0.5, "centers", CLASSES, DIM, 200),
    "small_loss": lambda: SmallLoss(0.4),
    "loss_quantile": lambda: LossQuantile(0.4, window=3),
    "knn_vote": lambda: KNNVote(CLASSES, DIM, k=5, noise_rate=0.4, memory_size=200, window=3),
    "consensus": lambda: Consensus(CLASSES, DIM, ROWS * STEPS, warmup_steps=2, smoothing=0.5),
    "tsint": lambda: TSINT(CLASSES, 0.4),
    "fixed": lambda: FixedFilter(torch.arange(ROWS * STEPS) % 3 > 0),
}
#: those that judge each label of a sample
MULTI_LABEL: dict[str, Callable[[], NoiseFilter]] = {
    "multi_label": lambda: MultiLabelPRISM(CLASSES, DIM, ROWS * STEPS, memory_size=200, warmup_steps=2),
    "multi_label_classifier": lambda: MultiLabelPRISM(
        CLASSES, DIM, ROWS * STEPS, "classifier", warmup_steps=2, weighting="hard"
    ),
    "multi_label_memory": lambda: MultiLabelPRISM(
        CLASSES, DIM, ROWS * STEPS, "memory", warmup_steps=2, noise_rate=0.2
    ),
}


def stream(seed: int = 0) -> list[FilterContext]:
    """Five batches with every optional field; 40 % of the labels are wrong."""
    g = torch.Generator().manual_seed(seed)
    n = ROWS * STEPS
    center = 2 * torch.randn(CLASSES, DIM, generator=g)
    truth = torch.arange(n) % CLASSES
    z = normalize(center[truth] + torch.randn(n, DIM, generator=g), dim=1)
    teacher = normalize(center[truth] + torch.randn(n, DIM, generator=g), dim=1)
    label = torch.where(torch.rand(n, generator=g) < 0.4, (truth + 1) % CLASSES, truth)
    logits = 4 * z @ normalize(center, dim=1).T
    loss = nn.functional.cross_entropy(logits, label, reduction="none")
    whole = FilterContext(z, label, torch.arange(n), logits, loss, proxies=center, teacher=teacher)
    return [rows_of(whole, part) for part in torch.arange(n).split(ROWS)]


def rows_of(ctx: FilterContext, rows: Any) -> FilterContext:
    """Some rows of a context, in that order."""
    fields = ("embedding", "label", "index", "logits", "per_sample_loss", "teacher")
    return replace(ctx, **{name: getattr(ctx, name)[rows] for name in fields})
