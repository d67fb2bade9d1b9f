"""One feature per training sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.memory.writes import (
    check_index,
    check_rows,
    check_size,
    check_vector,
    last_writer,
    wanted_rows,
)
from lightning_nrml.state import StateModule


class FeatureBank(StateModule):
    """The newest feature of each training sample, by dataset index, for epoch-level scoring and mining.

    Buffers have a fixed shape, are saved in checkpoints and written in place. Write *gathered* rows: the
    bank is then equal on all ranks.

    Args:
        num_samples: size of the training set, at least 1.
        dim: values per row, at least 1.

    Attributes:
        embedding: ``(N, dim)`` float32, rows as given (not normalised), 0 until written.
        epoch_seen: ``(N,)`` int64, epoch of the newest write, -1 = never.

    Raises:
        ValueError: if ``num_samples`` or ``dim`` is not a positive whole number.
    """

    embedding: Tensor
    epoch_seen: Tensor

    def __init__(self, num_samples: int, dim: int) -> None:
        super().__init__()
        check_size(num_samples, "num_samples", "FeatureBank")
        check_size(dim, "dim", "FeatureBank")
        self.num_samples = num_samples
        self.dim = dim
        self.register_buffer("embedding", torch.zeros(num_samples, dim, dtype=torch.float32))
        self.register_buffer("epoch_seen", torch.full((num_samples,), -1))

    @torch.no_grad()
    def write(self, index: Tensor, z: Tensor, epoch: int, keep: Tensor | None = None) -> None:
        """Store a batch; of several rows of one sample the last wins, on every device.

        Rows with a NaN or an infinity are skipped: the sample keeps its older feature and epoch.

        Args:
            index: ``(B,)`` dataset positions.
            z: ``(B, dim)`` features of any float type; detached and stored as float32.
            epoch: stored in ``epoch_seen``.
            keep: ``(B,)`` bool or weights; rows that are False or 0 are skipped.

        Raises:
            ValueError: if a shape is wrong.
            IndexError: if an index is outside the training set (checked on the CPU only).
        """
        check_rows(z, self.dim, "FeatureBank")
        check_vector(index, len(z), "index", "FeatureBank.write")
        if keep is not None:
            check_vector(keep, len(z), "keep", "FeatureBank.write")
        check_index(index, self.num_samples, "FeatureBank")
        z, index = z.to(self.embedding), index.to(self.epoch_seen)
        valid = wanted_rows(z, keep)
        source = last_writer(index, valid)
        written = valid[source]
        self.embedding.index_copy_(0, index, torch.where(written[:, None], z[source], self.embedding[index]))
        self.epoch_seen.index_copy_(0, index, torch.where(written, epoch, self.epoch_seen[index]))

    @property
    def filled(self) -> Tensor:
        """``(N,)`` bool, True for samples that were written at least once."""
        return self.epoch_seen >= 0

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"num_samples={self.num_samples}, dim={self.dim}"
