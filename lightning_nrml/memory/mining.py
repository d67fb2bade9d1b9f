"""Which images count as the same instance: the mining rules of InsCLR, as functions of tensors.

G groups (an anchor and its K nearest neighbours, so m = K + 1 rows), P pool entries per image, N training
images, D features. All features are unit rows. Everything is computed from the *gathered* batch and a
shared generator, so that the result is equal on all ranks and equals one process on the whole batch.

Source: Deng et al., "InsCLR: Improving Instance Retrieval with Self-Supervision", AAAI 2022, arXiv
2112.01390; details as in the authors' code, but for the images of the current batch, which are never
read from the memory here (there an anchor was pushed away from its own stored feature).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

_NOTHING = torch.iinfo(torch.int64).max


@dataclass
class MiningConfig:
    """Thresholds of the "impr" stage; all similarities are cosines.

    The official mode ``b+i_tr4_avg0.60_k05`` is the default: ``query`` ``b+i``, 4 ``rounds``, ``score``
    ``avg`` over similarities from ``hit`` = .60 on, ``pick`` = 5.

    Args:
        in_batch: a neighbour less similar to its anchor than this is rejected.
        in_batch_relative: divide that similarity by the largest one of the anchor's neighbours first.
        always_keep: this many nearest neighbours are never rejected.
        positive: pool entries from here on are positives at once.
        negative: pool entries below are negatives; those between the two are candidates.
        query: start the traversal from the batch alone (``b``) or also from the positives found at once.
        rounds: rounds of the traversal, 0 = no candidate is ever taken.
        score: of a candidate: mean or maximum of its similarities to the queries that reach ``hit``.
        hit: see ``score``; a candidate without a hit is not taken.
        pick: candidates taken per round and group, the best first; 0 = all that reach ``pick_score``.
        pick_score: see ``pick``.

    Raises:
        ValueError: a similarity outside [-1, 1], a negative count, thresholds in the wrong order.
    """

    in_batch: float = 0.6
    in_batch_relative: bool = False
    always_keep: int = 0
    positive: float = 0.75
    negative: float = 0.5
    query: Literal["b", "b+i"] = "b+i"
    rounds: int = 4
    score: Literal["avg", "max"] = "avg"
    hit: float = 0.6
    pick: int = 5
    pick_score: float = 0.65

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not -1.0 <= value <= 1.0:
                raise ValueError(f"mining.{field.name} is a cosine and must lie in [-1, 1], got {value}.")
            if type(value) is int and field.name in ("always_keep", "rounds", "pick") and value < 0:
                raise ValueError(f"mining.{field.name} is {value}: it must be 0 or more.")
        if self.negative > self.positive:
            raise ValueError(
                f"mining.negative {self.negative} is above mining.positive {self.positive}: swap them."
            )
        for name, choice in (("query", ("b", "b+i")), ("score", ("avg", "max"))):
            if getattr(self, name) not in choice:
                raise ValueError(f"mining.{name} must be one of {choice}, got {getattr(self, name)!r}.")


# ---- in the batch ---------------------------------------------------------------------------------------


def keep_neighbours(features: Tensor, config: MiningConfig) -> Tensor:
    """Which neighbours of the batch are similar enough to their anchor.

    Args:
        features: ``(G, m, D)`` un-augmented unit features, the anchor first, neighbours nearest first.
        config: thresholds.

    Returns:
        ``(G, K)`` bool. A NaN similarity is rejected.
    """
    similarity = torch.einsum("gd,gkd->gk", features[:, 0], features[:, 1:])
    if config.in_batch_relative and similarity.shape[1]:
        similarity = similarity / similarity.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
    kept = similarity >= config.in_batch
    kept[:, : config.always_keep] = True
    return kept


def group_labels(kept: Tensor) -> Tensor:
    """``(G, K)`` bool to ``(G, m)`` int64 labels: g + 1 for anchor and kept, -(g + 1) for rejected ones.

    Rejected neighbours of an anchor share a label, as published: inside the batch they are positives of
    each other and negatives of all else.
    """
    number = torch.arange(1, len(kept) + 1, device=kept.device)[:, None]
    return torch.cat([number, torch.where(kept, number, -number)], dim=1)


# ---- in the memory --------------------------------------------------------------------------------------


def draw(allowed: Tensor, size: int, generator: torch.Generator, first: Tensor | None = None) -> Tensor:
    """Up to ``size`` random positions of a mask, without replacement.

    Args:
        allowed: ``(N,)`` bool, what may be drawn.
        size: positions wanted.
        generator: on the CPU, so that all devices draw alike.
        first: ``(N,)`` bool, positions that are drawn before any others.

    Returns:
        ``(n,)`` int64, n = min(size, number allowed), ascending.
    """
    order = torch.rand(len(allowed), generator=generator, dtype=torch.float64).to(allowed.device)
    if first is not None:
        order = order + first.double()
    count = min(max(size, 0), int(allowed.sum()))
    return order.masked_fill(~allowed, -1.0).topk(count).indices.sort().values


def random_negatives(
    index: Tensor,
    neighbour: Tensor,
    filled: Tensor,
    size: int,
    generator: torch.Generator,
) -> Tensor:
    """The memory of the base stage: random rows that are no image of the batch nor near one.

    Args:
        index: ``(B,)`` images of the batch.
        neighbour: ``(B, P)`` their nearest pool entries, -1 = none.
        filled: ``(N,)`` bool, rows that were written.
        size: rows wanted.
        generator: of the draw.

    Returns:
        ``(n,)`` int64 dataset positions, all negatives.
    """
    allowed = filled.clone()
    allowed[index] = False
    allowed[neighbour[neighbour >= 0]] = False
    return draw(allowed, size, generator)


def mine(
    index: Tensor,
    kept: Tensor,
    features: Tensor,
    neighbour: Tensor,
    similarity: Tensor,
    bank: Tensor,
    filled: Tensor,
    config: MiningConfig,
    size: int,
    negatives: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The memory of the "impr" stage: positives by pool similarity and traversal, then negatives.

    Per group: pool entries of its kept images from ``positive`` on are positives; those between the
    thresholds (and positives of no group) are candidates, of which the traversal takes some. Negatives are
    pool entries below ``negative``, then random rows, up to ``size`` rows in all; neither positives nor
    candidates of any group are among them. Images of the batch are left out throughout.

    Args:
        index: ``(G, m)`` images of the batch.
        kept: ``(G, m)`` bool, rows that carry the label of their group.
        features: ``(G, m, D)`` un-augmented features of the batch.
        neighbour: ``(G, m, P)`` pool entries of these images, -1 = none.
        similarity: ``(G, m, P)`` their similarities.
        bank: ``(N, D)`` un-augmented features of the training set.
        filled: ``(N,)`` bool, rows that were written.
        config: thresholds.
        size: rows to return at most, unless there are more positives.
        negatives: whether to return negatives.
        generator: of the random rows.

    Returns:
        ``(M,)`` int64 dataset positions, each once, and ``(M,)`` labels: g + 1 for positives of group g (the
        last one, if several claim an image), G + 1 for negatives.
    """
    num_groups = len(index)
    usable = filled.clone()
    usable[index] = False
    entry = neighbour.flatten(1)
    score = similarity.flatten(1)
    known = kept[:, :, None].expand_as(neighbour).flatten(1) & (entry >= 0)
    entry = entry.clamp_min(0)
    known &= usable[entry]

    sure = known & (score >= config.positive)
    any_sure = _marked(entry, sure, len(bank))
    open_ = known & (score < config.positive) & (score >= config.negative) & ~any_sure[entry]
    start, start_mask = _packed(entry, sure)
    candidate, mask = _packed(entry, open_)
    query, query_mask = features, kept
    if config.query == "b+i":
        query = torch.cat([features, bank[start]], dim=1)
        query_mask = torch.cat([kept, start_mask], dim=1)
    taken = traverse(bank[candidate], mask, query, query_mask, config)

    number = torch.arange(1, num_groups + 1, device=index.device)[:, None]
    label = torch.zeros(len(bank), dtype=torch.int64, device=index.device)
    for rows, chosen in ((start, start_mask), (candidate, taken)):
        claim = torch.where(chosen, number, 0).flatten()
        label.scatter_reduce_(0, rows.flatten(), claim, "amax")
    positive = label.nonzero().flatten()
    if not negatives:
        return positive, label[positive]
    near = any_sure | _marked(entry, open_, len(bank))
    far = _marked(entry, known & (score < config.negative), len(bank))
    negative = draw(usable & ~near, size - len(positive), generator, far)
    ends = torch.full_like(negative, num_groups + 1)
    return torch.cat([positive, negative]), torch.cat([label[positive], ends])


def traverse(
    candidate: Tensor, mask: Tensor, query: Tensor, query_mask: Tensor, config: MiningConfig
) -> Tensor:
    """Take candidates round by round; what was taken asks along in the next round.

    Args:
        candidate: ``(G, C, D)`` features, padded.
        mask: ``(G, C)`` bool, False = padding.
        query: ``(G, Q, D)`` features to start from, padded.
        query_mask: ``(G, Q)`` bool.
        config: rounds, score, hit and pick.

    Returns:
        ``(G, C)`` bool, the candidates taken.
    """
    total = candidate.new_zeros(mask.shape)
    best = candidate.new_full(mask.shape, -torch.inf)
    count = torch.zeros_like(mask, dtype=torch.int64)
    taken = torch.zeros_like(mask)
    for _ in range(config.rounds if mask.shape[1] else 0):
        s = candidate @ query.mT
        hit = (s >= config.hit) & query_mask[:, None, :]
        total += torch.where(hit, s, 0.0).sum(dim=2)
        count += hit.sum(dim=2)
        best = torch.maximum(best, torch.where(hit, s, -torch.inf).amax(dim=2))
        score = total / count.clamp_min(1) if config.score == "avg" else best
        free = mask & ~taken & (count > 0)
        if config.pick:
            value, place = score.masked_fill(~free, -torch.inf).topk(min(config.pick, mask.shape[1]), dim=1)
            query_mask = value > -torch.inf
            taken = taken.scatter(1, place, query_mask | taken.gather(1, place))
        else:
            new = free & (score >= config.pick_score)
            width = int(new.sum(dim=1).max())
            if not width:
                break
            place = new.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
            query_mask = new.gather(1, place)
            taken = taken | new
        query = candidate.gather(1, place[:, :, None].expand(-1, -1, candidate.shape[2]))
    return taken


def _marked(entry: Tensor, chosen: Tensor, num_samples: int) -> Tensor:
    """``(N,)`` bool, True where a chosen entry points."""
    mark = torch.zeros(num_samples, dtype=torch.bool, device=entry.device)
    mark[entry[chosen]] = True
    return mark


def _packed(entry: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen entries of each row once, ascending, moved to the left, and which places are theirs.

    Args:
        entry: ``(G, E)`` int64.
        chosen: ``(G, E)`` bool.

    Returns:
        ``(G, C)`` int64, padded with 0, and ``(G, C)`` bool; C is the largest number in a row.
    """
    key = entry.masked_fill(~chosen, _NOTHING).sort(dim=1).values
    again = torch.zeros_like(chosen)
    again[:, 1:] = key[:, 1:] == key[:, :-1]
    key = key.masked_fill(again, _NOTHING).sort(dim=1).values
    mask = key < _NOTHING
    width = int(mask.sum(dim=1).max()) if mask.numel() else 0
    mask = mask[:, :width]
    return key[:, :width].masked_fill(~mask, 0), mask
