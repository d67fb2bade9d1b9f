"""Samplers that know about ranks, so that the batches mean the same on one device and on many.

All subclass :class:`torch.utils.data.distributed.DistributedSampler`: Lightning leaves such
samplers alone (its own wrapper would reshuffle an m-per-class stream: 8 classes x 4 images became 22
classes) and calls ``set_epoch`` before every epoch. They use no global random state.

The training samplers plan an epoch as *global* batches of ``num_replicas * batch_size`` rows; rank ``r``
takes rows ``[r * batch_size, (r + 1) * batch_size)`` of each. Two ranks of batch size B therefore see
together exactly what one process of batch size 2B sees with the same seed. Use them as
``DataLoader(dataset, sampler=sampler, batch_size=B, drop_last=True)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from lightning_nrml import distributed


def _shuffled_stream(size: int, width: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """``rounds * width`` cards off freshly shuffled decks of ``size``, no hand of ``width`` with a repeat.

    A hand that straddles two decks would hold some card twice by chance, so such cards move back in the
    second deck. Needs ``width <= size``.
    """
    decks = [rng.permutation(size)]
    dealt = size
    while dealt < rounds * width:
        deck = rng.permutation(size)
        begun = dealt % width
        if begun:
            taken = np.zeros(size, dtype=bool)
            taken[decks[-1][-begun:]] = True
            lead = deck[~taken[deck]][: width - begun]
            taken[:] = False
            taken[lead] = True
            deck = np.concatenate([lead, deck[~taken[deck]]])
        decks.append(deck)
        dealt += size
    return np.concatenate(decks)[: rounds * width]


def _deal(size: int, width: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Deal ``rounds`` hands of ``width`` from ``size`` cards: ``(rounds, width)`` int64.

    Within a hand each card occurs ``floor(width / size)`` or ``ceil(width / size)`` times, and any first
    ``size`` cards of a hand differ; over the hands, all cards come up before one returns.
    """
    copies, rest = divmod(width, size)
    parts = []
    if copies:
        whole = np.tile(np.arange(size), (rounds * copies, 1))
        parts.append(rng.permuted(whole, axis=1).reshape(rounds, copies * size))
    if rest:
        parts.append(_shuffled_stream(size, rest, rounds, rng).reshape(rounds, rest))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _check_keep(keep: Tensor | None, num_samples: int) -> None:
    if keep is not None and (keep.dtype is not torch.bool or keep.shape != (num_samples,)):
        raise ValueError(
            f"keep must be a bool tensor of shape ({num_samples},), one entry per training sample, "
            f"got {keep.dtype} of shape {tuple(keep.shape)}"
        )


class _EpochSampler(DistributedSampler[int]):
    """What the two training samplers share: global batches, ``keep``, ``start_batch``.

    Attributes:
        keep: ``(N,)`` bool tensor or ``None``; read whenever an epoch starts, so it may be changed in
            place between epochs. Must be equal on all ranks.
        start_batch: this many batches are left out of the next epoch only (resuming in mid-epoch).
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_replicas: int | None,
        rank: int | None,
        seed: int,
        keep: Tensor | None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        _check_keep(keep, num_samples)
        super().__init__(
            range(num_samples),  # type: ignore[arg-type]  # only its length is used
            num_replicas=distributed.world_size() if num_replicas is None else num_replicas,
            rank=distributed.rank() if rank is None else rank,
            seed=seed,
            drop_last=True,
        )
        self.batch_size = batch_size
        self.keep = keep
        self.start_batch = 0
        self._drawable = np.arange(num_samples)

    @property
    def global_batch_size(self) -> int:
        """Rows of one batch over all ranks."""
        return self.batch_size * self.num_replicas

    @property
    def num_batches(self) -> int:
        """Batches per epoch under the present ``keep``; the same on every rank."""
        return max(1, len(self._pool()) // self.global_batch_size)

    def __len__(self) -> int:
        """Indices that this rank draws in a whole epoch; ``start_batch`` does not count.

        Lightning counts the batches done before a resume as fetched, so the full length is what it needs.
        """
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        # A generator, so that nothing is consumed before the first index is asked for: a DataLoader with
        # persistent workers makes two iterators and drops the first.
        if self.start_batch < 0:
            raise ValueError(f"start_batch must not be negative, got {self.start_batch}")
        start, self.start_batch = self.start_batch, 0
        pool = self._pool()
        if self.keep is not None and len(pool) and not bool(self.keep[int(pool[0])]):
            warnings.warn(
                "keep drops every training sample: this epoch draws from all of them instead; "
                "either the noise filter is too strict, or all images that the tables keep are missing",
                stacklevel=2,
            )
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = self._global_batches(pool, rng)
        first = self.rank * self.batch_size
        yield from batches[start:, first : first + self.batch_size].ravel().tolist()

    def _pool(self) -> np.ndarray:
        """Sorted indices that may be drawn; everything drawable if ``keep`` leaves nothing."""
        if self.keep is None:
            return self._drawable
        kept = self._drawable[self.keep.cpu().numpy()[self._drawable]]
        return kept if len(kept) else self._drawable

    def _global_batches(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``(num_batches, global_batch_size)`` sample indices of this epoch."""
        raise NotImplementedError(f"{type(self).__name__} must implement _global_batches(pool, rng).")


class MPerClassSampler(_EpochSampler):
    """Batches of ``P`` classes with ``m`` images each, the usual diet of metric learning.

    Classes come up equally often whatever their size: each epoch goes through shuffled lists of all
    classes, and each class through shuffled lists of its images, before anything returns. Within a global
    batch a class appears once, and an image repeats only if its class has fewer than ``m`` drawable images
    (a class of one image gives ``m`` copies of it: trivial positives, but no crash).

    If ``keep`` leaves fewer classes than a batch needs, classes appear in several groups of the same batch,
    with different images as far as they have them. If ``keep`` drops everything, it is ignored with a
    warning. Samples with a negative label (unlabelled) are never drawn.

    Args:
        label: ``(N,)`` integer labels as given (noisy ones, not clean ones).
        m: images per class and batch.
        batch_size: rows per rank; a multiple of ``m``.
        num_replicas: number of ranks; default: of the running process group.
        rank: this rank; default: of the running process group.
        seed: of the shuffling, together with the epoch; equal on all ranks.
        keep: ``(N,)`` bool, ``False`` = never drawn; obeyed from the next epoch on when changed in place.
        length: global batches per epoch; default ``floor(kept / (num_replicas * batch_size))``, at least 1.

    Raises:
        ValueError: ``batch_size`` is no multiple of ``m``, or a batch needs more classes than exist.
    """

    def __init__(
        self,
        label: Tensor,
        m: int,
        batch_size: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        keep: Tensor | None = None,
        length: int | None = None,
    ) -> None:
        given = torch.as_tensor(label).detach().cpu()
        if given.ndim != 1 or given.is_floating_point():
            raise ValueError(
                f"label must be integers of shape (N,), got {given.dtype} of shape {tuple(given.shape)}"
            )
        super().__init__(len(given), batch_size, num_replicas, rank, seed, keep)
        if m < 1 or batch_size % m:
            raise ValueError(f"batch_size must be a multiple of m, got batch_size={batch_size} and m={m}")
        if length is not None and length < 1:
            raise ValueError(f"length counts global batches and must be at least 1, got {length}")
        self.m = m
        self.length = length
        self._label = given.numpy().astype(np.int64)
        self._drawable = np.flatnonzero(self._label >= 0)
        needed = self.global_batch_size // m
        classes = len(np.unique(self._label[self._drawable]))
        if needed > classes:
            raise ValueError(
                f"batch_size={batch_size} on {self.num_replicas} process(es) with m={m} needs {needed} "
                f"classes per batch, but the labels have {classes}; lower batch_size or raise m"
            )

    @property
    def num_batches(self) -> int:
        """Batches per epoch under the present ``keep``; the same on every rank."""
        return super().num_batches if self.length is None else self.length

    def _global_batches(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        members = pool[np.argsort(self._label[pool], kind="stable")]
        _, starts, sizes = np.unique(self._label[members], return_index=True, return_counts=True)
        num_groups = self.global_batch_size // self.m
        groups = _deal(len(sizes), num_groups, self.num_batches, rng).ravel()
        copies = -(-num_groups // len(sizes))  # most groups of one class in a batch; 1 unless keep is harsh

        # One hand of images per (class, batch), in that order; a class's groups in a batch share a hand.
        order = np.argsort(groups, kind="stable")
        class_of, batch_of = groups[order], order // num_groups
        first = np.ones(len(order), dtype=bool)
        first[1:] = (class_of[1:] != class_of[:-1]) | (batch_of[1:] != batch_of[:-1])
        hand_of = np.cumsum(first) - 1
        copy_of = np.arange(len(order)) - np.flatnonzero(first)[hand_of]
        rounds = np.bincount(class_of[first], minlength=len(sizes))
        hands = [
            _deal(size, copies * self.m, count, rng) + start
            for size, count, start in zip(sizes.tolist(), rounds.tolist(), starts.tolist(), strict=True)
            if count
        ]
        picks = np.empty((len(order), self.m), dtype=np.int64)
        picks[order] = np.concatenate(hands).reshape(-1, copies, self.m)[hand_of, copy_of]
        return members[picks].reshape(self.num_batches, self.global_batch_size)


class ShuffleSampler(_EpochSampler):
    """Plain shuffling in global batches: each epoch draws every kept sample at most once.

    The last incomplete global batch is left out. If ``keep`` leaves less than one global batch, the epoch
    is one batch in which samples repeat as evenly as possible; if it leaves nothing, it is ignored with a
    warning.

    Args:
        num_samples: N, size of the training set.
        batch_size: rows per rank.
        num_replicas: number of ranks; default: of the running process group.
        rank: this rank; default: of the running process group.
        seed: of the shuffling, together with the epoch; equal on all ranks.
        keep: ``(N,)`` bool, ``False`` = never drawn; obeyed from the next epoch on when changed in place.

    Raises:
        ValueError: the training set is smaller than one global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        keep: Tensor | None = None,
    ) -> None:
        super().__init__(num_samples, batch_size, num_replicas, rank, seed, keep)
        if num_samples < self.global_batch_size:
            raise ValueError(
                f"batch_size={batch_size} on {self.num_replicas} process(es) needs {self.global_batch_size} "
                f"training samples, but there are {num_samples}; lower batch_size"
            )

    def _global_batches(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return pool[_deal(len(pool), self.global_batch_size, self.num_batches, rng)]


class NeighbourSampler(_EpochSampler):
    """Batches of anchors, each followed by its K nearest training images, as InsCLR wants them.

    An epoch goes through all kept images as anchors once, in shuffled order; the last incomplete global
    batch is left out. A neighbour that does not exist (-1) or that ``keep`` drops is replaced by the anchor
    itself, which its random view makes a positive of itself: an empty table gives K + 1 views of each image.

    Args:
        neighbours: ``(N, K)`` int64 table, nearest first, -1 = none; read whenever an epoch starts, so it
            may be changed in place between epochs. Must be equal on all ranks.
        batch_size: rows per rank; a multiple of K + 1.
        num_replicas: number of ranks; default: of the running process group.
        rank: this rank; default: of the running process group.
        seed: of the shuffling, together with the epoch; equal on all ranks.
        keep: ``(N,)`` bool, ``False`` = never drawn; obeyed from the next epoch on when changed in place.

    Raises:
        ValueError: ``batch_size`` is no multiple of K + 1, or there are fewer images than anchors in a batch.
    """

    def __init__(
        self,
        neighbours: Tensor,
        batch_size: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        keep: Tensor | None = None,
    ) -> None:
        if neighbours.ndim != 2 or neighbours.is_floating_point():
            raise ValueError(
                f"neighbours must be integers of shape (N, K), got {neighbours.dtype} of shape "
                f"{tuple(neighbours.shape)}"
            )
        super().__init__(len(neighbours), batch_size, num_replicas, rank, seed, keep)
        self.neighbours = neighbours
        rows = neighbours.shape[1] + 1
        if batch_size % rows:
            raise ValueError(
                f"batch_size must be a multiple of {rows}, an anchor and its {rows - 1} neighbours, "
                f"got {batch_size}"
            )
        if len(neighbours) < self.anchors:
            raise ValueError(
                f"batch_size={batch_size} on {self.num_replicas} process(es) needs {self.anchors} anchors, "
                f"but there are {len(neighbours)} training samples; lower batch_size"
            )

    @property
    def anchors(self) -> int:
        """Anchors of one batch over all ranks."""
        return self.global_batch_size // (self.neighbours.shape[1] + 1)

    @property
    def num_batches(self) -> int:
        """Batches per epoch under the present ``keep``; the same on every rank."""
        return max(1, len(self._pool()) // self.anchors)

    def _global_batches(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        anchor = pool[_deal(len(pool), self.anchors, self.num_batches, rng)]
        near = self.neighbours.cpu().numpy()[anchor]
        drawable = np.zeros(len(self.neighbours), dtype=bool)
        drawable[pool] = True
        near = np.where((near >= 0) & drawable[near], near, anchor[..., None])
        groups = np.concatenate([anchor[..., None], near], axis=-1)
        return groups.reshape(self.num_batches, self.global_batch_size)


class UnpaddedSampler(DistributedSampler[int]):
    """Every item exactly once over the ranks, in order: contiguous blocks, none padded.

    For evaluation, where the duplicates that padding adds would count as hits. The blocks differ by at most
    one item (21 items on 2 ranks: 11 and 10), so ranks may have unequal numbers of batches: gather results
    once at the end of the epoch, not per batch.

    Args:
        num_samples: number of items, at least 0.
        num_replicas: number of ranks; default: of the running process group.
        rank: this rank; default: of the running process group.
    """

    def __init__(self, num_samples: int, num_replicas: int | None = None, rank: int | None = None) -> None:
        super().__init__(
            range(num_samples),  # type: ignore[arg-type]  # only its length is used
            num_replicas=distributed.world_size() if num_replicas is None else num_replicas,
            rank=distributed.rank() if rank is None else rank,
            shuffle=False,
        )
        share, extra = divmod(num_samples, self.num_replicas)
        start = self.rank * share + min(self.rank, extra)
        self._block = range(start, start + share + (self.rank < extra))

    def __len__(self) -> int:
        return len(self._block)

    def __iter__(self) -> Iterator[int]:
        return iter(self._block)
