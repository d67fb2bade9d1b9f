"""First-in first-out ring of features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_nrml.memory.writes import check_rows, check_size, check_vector, wanted_rows
from lightning_nrml.state import StateModule


class FeatureQueue(StateModule):
    """A ring of the newest ``size`` features, for cross-batch losses and filters (XBM, MoCo, PRISM).

    Buffers have a fixed shape, are saved in checkpoints (pointer and fill count included) and are
    written in place; an ``enqueue`` costs the same for every queue size. Every batch size is right: a
    batch that passes the end goes on at the start, and of a batch larger than the queue the newest
    ``size`` rows stay. On a GPU ``enqueue`` never makes the host wait.

    Under several processes enqueue *gathered* rows: the queue is then equal on all ranks and DDP need
    not broadcast it (``equal_on_all_ranks``).

    Args:
        size: number of rows kept, at least 1.
        dim: values per row, at least 1.
        with_label: keep a label for each row; then ``enqueue`` needs one.

    Attributes:
        embedding: ``(size, dim)`` float32, rows as given (not normalised).
        label: ``(size,)`` int64, -1 = empty; ``None`` without labels.
        index: ``(size,)`` int64 dataset positions, -1 = empty or unknown.
        pointer: 0-d int64, the row that is written next.
        count: 0-d int64, filled rows.

    Raises:
        ValueError: if ``size`` or ``dim`` is not a positive whole number.
    """

    embedding: Tensor
    label: Tensor | None
    index: Tensor
    pointer: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int, with_label: bool = True) -> None:
        super().__init__()
        check_size(size, "size", "FeatureQueue")
        check_size(dim, "dim", "FeatureQueue")
        self.size = size
        self.dim = dim
        self.with_label = with_label
        self.register_buffer("embedding", torch.zeros(size, dim, dtype=torch.float32))
        self.register_buffer("label", torch.full((size,), -1) if with_label else None)
        self.register_buffer("index", torch.full((size,), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("count", torch.tensor(0))
        self._full = False  # a full ring stays full, so ``get`` need not ask the GPU any more

    @torch.no_grad()
    def enqueue(
        self,
        z: Tensor,
        label: Tensor | None = None,
        index: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> None:
        """Write a batch over the oldest rows. Call it after the backward pass (see :meth:`get`).

        Rows with a NaN or an infinity are skipped: they never enter the queue.

        Args:
            z: ``(B, dim)`` features of any float type; detached and stored as float32.
            label: ``(B,)`` labels, if the queue keeps labels.
            index: ``(B,)`` dataset positions; -1 is stored without them.
            keep: ``(B,)`` bool or weights; rows that are False or 0 are skipped.

        Raises:
            ValueError: if a shape is wrong, or ``label`` is missing or not wanted.
        """
        self._check(z, label, index, keep)
        z = z.detach().to(self.embedding)
        pairs = [(self.embedding, z), (self.index, index)]
        if self.label is not None:
            pairs.append((self.label, label))
        if z.device.type != "cpu":
            self._write_masked(pairs, wanted_rows(z, keep))
            return
        num = len(z)
        if keep is not None or not math.isfinite(z.sum()):  # else one number says that all rows are good
            good = wanted_rows(z, keep).nonzero().squeeze(1)
            num = len(good)
            pairs = [(ring, None if rows is None else rows[good]) for ring, rows in pairs]
        self._write_slices(pairs, num)

    def get(self) -> tuple[Tensor, Tensor | None]:
        """The filled rows ``(n, dim)`` and their labels ``(n,)`` or ``None``; oldest first is not promised.

        These are views. A later ``enqueue`` changes them, and autograd refuses the backward pass of a
        loss that still needs them: enqueue after the backward pass.
        """
        n = len(self)
        return self.embedding[:n], None if self.label is None else self.label[:n]

    def get_index(self) -> Tensor:
        """Dataset positions ``(n,)`` of the rows that :meth:`get` returns, -1 where unknown."""
        return self.index[: len(self)]

    def __len__(self) -> int:
        if not self._full:
            n = int(self.count)
            self._full = n == self.size
            return n
        return self.size

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue."""
        self.embedding.zero_()
        self.index.fill_(-1)
        self.pointer.zero_()
        self.count.zero_()
        if self.label is not None:
            self.label.fill_(-1)
        self._full = False

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"size={self.size}, dim={self.dim}, with_label={self.with_label}"

    def _write_slices(self, pairs: list[tuple[Tensor, Tensor | None]], num: int) -> None:
        """Plain slice copies; needs to know the pointer, which costs nothing on the CPU."""
        skip = max(num - self.size, 0)
        num -= skip
        start = int(self.pointer)
        head = min(num, self.size - start)
        for ring, rows in pairs:
            ring[start : start + head] = -1 if rows is None else rows[skip : skip + head]
            if head < num:
                ring[: num - head] = -1 if rows is None else rows[skip + head :]
        self.pointer.fill_((start + num) % self.size)
        if not self._full:
            self.count.fill_(min(int(self.count) + num, self.size))

    def _write_masked(self, pairs: list[tuple[Tensor, Tensor | None]], written: Tensor) -> None:
        """The same with fixed shapes: skipped rows are sorted last and write what is there already."""
        rank_from_end = written.flip(0).cumsum(0).flip(0)
        written = written & (rank_from_end <= self.size)
        order = (~written).sort(stable=True).indices[: self.size]
        valid = written[order]
        slot = (self.pointer + torch.arange(len(order), device=order.device)) % self.size
        for ring, rows in pairs:
            old = ring[slot]
            new = torch.full_like(old, -1) if rows is None else rows.to(ring)[order]
            mask = valid if ring.ndim == 1 else valid[:, None]
            ring.index_copy_(0, slot, torch.where(mask, new, old))
        num = written.sum()
        self.pointer.add_(num).remainder_(self.size)
        self.count.add_(num).clamp_(max=self.size)

    def _check(self, z: Tensor, label: Tensor | None, index: Tensor | None, keep: Tensor | None) -> None:
        check_rows(z, self.dim, "FeatureQueue")
        if (label is not None) != self.with_label:
            fact = (
                "needs 'label'" if self.with_label else "was built with with_label=False and takes no 'label'"
            )
            raise ValueError(f"FeatureQueue.enqueue {fact}.")
        for name, x in (("label", label), ("index", index), ("keep", keep)):
            if x is not None:
                check_vector(x, len(z), name, "FeatureQueue.enqueue")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._full = False
