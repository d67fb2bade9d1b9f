"""The nearest neighbours of every training sample, kept for a while."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.memory.writes import check_index, check_size
from lightning_nrml.state import StateModule


class CandidatePool(StateModule):
    """Neighbours and cosines of each training sample, as found at the last search.

    Buffers have a fixed shape, are saved in checkpoints and written in place. Fill the pool from *gathered*
    features: it is then equal on all ranks.

    Args:
        num_samples: size of the training set N, at least 1.
        size: neighbours per sample P, at least 1.

    Attributes:
        neighbour: ``(N, P)`` int32 dataset positions, best first; -1 = no (further) neighbour.
        similarity: ``(N, P)`` float32 cosines of these; -inf = none.
        epoch: 0-d int64, epoch for which the pool was filled, -1 = never.

    Raises:
        ValueError: if a size is not a positive whole number.
    """

    neighbour: Tensor
    similarity: Tensor
    epoch: Tensor

    def __init__(self, num_samples: int, size: int) -> None:
        super().__init__()
        check_size(num_samples, "num_samples", "CandidatePool")
        check_size(size, "size", "CandidatePool")
        self.num_samples, self.size = num_samples, size
        self.register_buffer("neighbour", torch.full((num_samples, size), -1, dtype=torch.int32))
        self.register_buffer("similarity", torch.full((num_samples, size), -torch.inf, dtype=torch.float32))
        self.register_buffer("epoch", torch.tensor(-1))

    @torch.no_grad()
    def fill(self, index: Tensor, neighbour: Tensor, similarity: Tensor, epoch: int) -> None:
        """Replace the whole pool by new neighbours; samples that are not named have none.

        Args:
            index: ``(n,)`` dataset positions, each once.
            neighbour: ``(n, p)`` int64 dataset positions with ``p <= size``, best first, -1 = none.
            similarity: ``(n, p)`` their cosines; a NaN or infinite one makes its place empty.
            epoch: the epoch to come.

        Raises:
            ValueError: if the shapes do not agree.
            IndexError: if an index is outside the training set (checked on the CPU only).
        """
        if neighbour.shape != similarity.shape or neighbour.shape[:1] != index.shape:
            raise ValueError(
                f"CandidatePool.fill: 'neighbour' and 'similarity' must both be ({len(index)}, p), got "
                f"{tuple(neighbour.shape)} and {tuple(similarity.shape)}."
            )
        if neighbour.shape[1] > self.size:
            raise ValueError(f"CandidatePool holds {self.size} neighbours, got {neighbour.shape[1]}.")
        check_index(index, self.num_samples, "CandidatePool")
        index = index.to(self.epoch.device)
        valid = (neighbour >= 0) & similarity.isfinite()
        self.neighbour.fill_(-1)
        self.similarity.fill_(-torch.inf)
        columns = slice(neighbour.shape[1])
        self.neighbour[index, columns] = neighbour.masked_fill(~valid, -1).to(self.neighbour)
        self.similarity[index, columns] = similarity.masked_fill(~valid, -torch.inf).to(self.similarity)
        self.epoch.fill_(epoch)

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours (int64) and cosines of some samples: ``(...,) -> (..., P), (..., P)``."""
        return self.neighbour[index].long(), self.similarity[index]

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"num_samples={self.num_samples}, size={self.size}"
