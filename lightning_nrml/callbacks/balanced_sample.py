"""A bounded, class-balanced sample of the rows that stream by, the same on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.data.views.rng import row_hash

_NO_TRUTH = -2  # -1 is a value of true labels: none of the classes


@dataclass(frozen=True)
class Sample:
    """Rows in the order of ``index``.

    Args:
        embedding: ``(n, D)`` float32, finite.
        index: ``(n,)`` int64 positions in the split, each once.
        label: ``(n,)`` int64 labels as given.
        clean_label: ``(n,)`` int64 true labels, ``None`` where no batch had any.
        seen: rows of the split that were offered.
        not_finite: rows among them that held NaN or infinity, which are left out.
    """

    embedding: Tensor
    index: Tensor
    label: Tensor
    clean_label: Tensor | None
    seen: int
    not_finite: int


def sample_order(index: Tensor, label: Tensor, per_class: int, seed: int) -> Tensor:
    """The order in which rows get into a sample: its first ``k`` rows are the sample of size ``k``.

    Class after class, each with its first ``per_class`` rows; then one more row of every class in turn. The
    order of the classes and of the rows within a class is random by a hash of their numbers. So the first
    ``k`` rows of a union are found among the first ``k`` of its parts: a part may forget the others.

    Args:
        index: ``(n,)`` different positions in the data set.
        label: ``(n,)`` integers.
        per_class: rows of a class that come before another class is begun.
        seed: of the hashes.

    Returns:
        ``(n,)`` row numbers.
    """
    order = row_hash(index, seed).argsort()
    grouped = order[label[order].argsort(stable=True)]
    counts = label[grouped].unique_consecutive(return_counts=True)[1]
    start = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty_like(grouped)
    place[grouped] = torch.arange(len(grouped), device=grouped.device) - start  # within its class, from 0
    turn = (place - per_class + 1).clamp_min(0)
    of_class = torch.where(turn == 0, row_hash(label, seed, stream=1), 0)
    for key in (of_class, turn):  # the most significant one last
        order = order[key[order].argsort(stable=True)]
    return order


class BalancedSample:
    """Takes in batches and keeps at most ``2 size`` rows and a batch of them.

    Args:
        size: rows of the sample over all ranks.
        per_class: see :func:`sample_order`.
        seed: equal seeds give equal samples, whatever the batches and the ranks.
    """

    def __init__(self, size: int, per_class: int, seed: int) -> None:
        self.size, self.per_class, self.seed = size, per_class, seed
        self._rows: list[Tensor] = []
        self._facts: list[Tensor] = []  # (n, 3): index, label, clean label
        self._counts = [0, 0]

    def add(self, embedding: Tensor, index: Tensor, label: Tensor, clean_label: Tensor | None = None) -> None:
        """Take in ``(B, D)`` embeddings with their ``(B,)`` positions and labels."""
        clean = torch.full_like(label, _NO_TRUTH) if clean_label is None else clean_label
        facts = torch.stack([x.long().to(embedding.device) for x in (index, label, clean)], dim=1)
        finite = embedding.isfinite().all(dim=1)
        self._rows.append(embedding[finite])
        self._facts.append(facts[finite])
        self._counts = [self._counts[0] + len(facts), self._counts[1] + int((~finite).sum())]
        if sum(map(len, self._rows)) > 2 * self.size:
            rows, facts = self._best(torch.cat(self._rows), torch.cat(self._facts))
            self._rows, self._facts = [rows], [facts]

    def gathered(self, device: torch.device) -> Sample:
        """The sample of all ranks, on all ranks; a rank may have no rows."""
        width = max(distributed.gather_sizes(self._rows[0].shape[1] if self._rows else 0, device))
        rows = torch.cat([torch.empty(0, width, device=device), *self._rows])
        facts = torch.cat([torch.empty(0, 3, dtype=torch.int64, device=device), *self._facts])
        facts, sizes = distributed.gather_ragged(facts)
        rows, facts = self._best(distributed.gather(rows, sizes=sizes), facts)
        seen, not_finite = distributed.reduce_sum(torch.tensor(self._counts, device=device)).tolist()
        index, label, clean = facts.unbind(1)
        known = bool((clean != _NO_TRUTH).any())
        return Sample(rows, index, label, clean if known else None, seen, not_finite)

    def _best(self, rows: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """The sample of some rows, in the order of their positions."""
        order = facts[:, 0].argsort(stable=True)
        index = facts[order, 0]
        # samplers that give all ranks equal numbers of rows repeat some
        order = order[torch.cat([index[:1] == index[:1], index[1:] != index[:-1]])]
        index, label = facts[order, 0], facts[order, 1]
        order = order[sample_order(index, label, self.per_class, self.seed)[: self.size].sort().values]
        return rows[order], facts[order]
