"""The nearest samples with a trusted label, to look at beside a suspect."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_nrml.audit.scores import AuditScores
from lightning_nrml.metrics.search import prepare_rows, topk_search

#: suspect -> its neighbours and their cosines, nearest first
Neighbours = dict[int, list[tuple[int, float]]]


def trusted_neighbours(
    embedding: Tensor,
    rows: Tensor,
    label: Tensor,
    scores: AuditScores,
    suspects: Tensor,
    count: int,
    labels: int = 1,
) -> Neighbours:
    """The nearest samples whose own label is trusted: P_clean at least one half, nothing else suggested.

    Of multi-label data (see :mod:`lightning_nrml.audit.labels`) the ``count`` nearest samples that are
    trusted to have the suspect's label, then the ``count`` nearest that are trusted to lack it.

    Args:
        embedding: ``(M, D)``.
        rows: ``(M,)`` samples that the embeddings are of.
        label: ``(N,)`` given classes; of multi-label data ``(N * L,)`` those of the entries.
        scores: of all of ``label``.
        suspects: positions in ``label`` to find neighbours for; those without an embedding are left out.
        count: neighbours of each kind, 0 = none.
        labels: L; 1 = one class per sample.

    Returns:
        Suspect -> ``(position in label, cosine)``; never the suspect's own sample.
    """
    place = torch.full((len(label) // labels,), -1)  # sample -> row of the embeddings
    place[rows] = torch.arange(len(rows))
    suspects = suspects[place[suspects // labels] >= 0]
    trusted = (scores.log_p_clean.exp() >= 0.5) & (scores.suggested == label)
    row = prepare_rows(embedding.cpu(), "cosine", "embedding")
    out: Neighbours = {suspect: [] for suspect in suspects.tolist()}
    for asking, gallery in _groups(suspects, trusted, label, labels):
        if not len(gallery) or not count:
            continue
        query, candidate = place[asking // labels], place[gallery // labels]
        itself = torch.full((len(row),), -1)  # row of the embeddings -> row of the gallery
        itself[candidate] = torch.arange(len(gallery))
        value, found = topk_search(row[query], row[candidate], count, exclude=itself[query], similarity="dot")
        for suspect, values, indices in zip(asking.tolist(), value.tolist(), found.tolist(), strict=True):
            near = zip(indices, values, strict=True)
            out[suspect] += [(int(gallery[i]), v) for i, v in near if i >= 0]
    return {suspect: near for suspect, near in out.items() if near}


def _groups(suspects: Tensor, trusted: Tensor, label: Tensor, labels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Suspects that look for neighbours among the same positions, and these."""
    if labels == 1:
        yield suspects, trusted.nonzero()[:, 0]
        return
    position = suspects % labels
    for c in position.unique().tolist():
        entry = torch.arange(c, len(label), labels)
        for value in (1, 0):
            yield suspects[position == c], entry[trusted[entry] & (label[entry] == 2 * c + value)]
