"""Neighbours of suspects against a loop over all pairs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.audit.neighbours import trusted_neighbours

N, D, C = 30, 5, 3


def scene(labels: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Embeddings of 25 of the samples in any order, labels (or entries ``2 c + value``) and scores."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(N, generator=g)[:25]
    label = torch.randint(C, (N,), generator=g)
    if labels > 1:
        label = (2 * torch.arange(labels) + torch.randint(2, (N, labels), generator=g)).flatten()
    suggested = torch.where(torch.rand(len(label), generator=g) < 0.2, (label + 1) % C, label)
    log_p = torch.rand(len(label), generator=g).log()
    return (
        torch.randn(25, D, generator=g),
        rows,
        label,
        SimpleNamespace(log_p_clean=log_p, suggested=suggested),
    )


@pytest.mark.parametrize("labels", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_they_are_the_nearest_trusted_ones(labels: int, count: int) -> None:
    embedding, rows, label, scores = scene(labels)
    # samples without an embedding are not judged
    absent = torch.tensor([i not in rows for i in range(N)]).repeat_interleave(labels)
    scores.log_p_clean[absent] = torch.nan
    suspects = torch.arange(0, len(label), 3)
    found = trusted_neighbours(embedding, rows, label, scores, suspects, count, labels)
    unit, place = F.normalize(embedding, dim=1), {int(i): r for r, i in enumerate(rows)}
    trusted = [
        p for p in range(len(label)) if scores.log_p_clean[p].exp() >= 0.5 and scores.suggested[p] == label[p]
    ]
    want: dict[int, list[int]] = {}
    for s in suspects.tolist():
        if s // labels not in place:
            continue
        kinds: list[int | None] = [None] if labels == 1 else [1, 0]
        near: list[int] = []
        for value in kinds:
            gallery = [
                p
                for p in trusted
                if p // labels != s // labels
                and (value is None or (p % labels == s % labels and label[p] == 2 * (s % labels) + value))
            ]
            gallery.sort(key=lambda p, s=s: -float(unit[place[s // labels]] @ unit[place[p // labels]]))
            near += gallery[:count]
        if near:
            want[s] = near
    assert {s: [p for p, _ in near] for s, near in found.items()} == want
    for s, near in found.items():
        for p, cosine in near:
            assert cosine == pytest.approx(
                float(unit[place[s // labels]] @ unit[place[p // labels]]), abs=1e-6
            )


@pytest.mark.parametrize("labels", [1, 4])
def test_nothing_is_trusted(labels: int) -> None:
    embedding, rows, label, scores = scene(labels)
    scores.log_p_clean.fill_(-1.0)
    assert trusted_neighbours(embedding, rows, label, scores, torch.arange(len(label)), 3, labels) == {}
