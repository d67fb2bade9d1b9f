"""A memory of features with many labels each that always knows the sums of every label."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.memory.centers import on_grid
from lightning_nrml.memory.writes import check_size, last_writer
from lightning_nrml.state import StateModule


class LabelCenters(StateModule):
    """The last unit feature of every sample, and what the rows with and without each label sum up to.

    Sample ``i`` has the slot ``i % memory_size``: with as many slots as samples each one has its own, with
    fewer the newest of those that share a slot stays. As the memory knows whose rows it holds, a sample can
    be compared with a label's rows *without its own*. The sums change by what comes and goes, exactly, and
    are never rebuilt; a write costs the same for every memory size, and nothing waits for the device.
    ``4 D + L + 8`` bytes for each slot.

    Args:
        num_labels: labels ``L``.
        embedding_dim: embedding size ``D``.
        memory_size: slots ``M``.

    Attributes:
        memory: ``(M, D)`` float32 unit rows. memory_index: ``(M,)`` int64, whose they are, -1 = empty.
        trust: ``(M, L)`` int8: 1 = has the label, -1 = has it not, 0 = not trusted in this.
        total: ``(2, L, D)`` float64, sums of the rows without and with each label.
        count: ``(2, L)`` int64, their numbers.

    Raises:
        ValueError: for a size that is not a positive whole number.
    """

    memory: Tensor
    memory_index: Tensor
    trust: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, num_labels: int, embedding_dim: int, memory_size: int) -> None:
        super().__init__()
        sizes = {"num_labels": num_labels, "embedding_dim": embedding_dim, "memory_size": memory_size}
        for name, value in sizes.items():
            check_size(value, name, "LabelCenters")
        self.memory_size = memory_size
        self.register_buffer("memory", torch.zeros(memory_size, embedding_dim, dtype=torch.float32))
        self.register_buffer("memory_index", torch.full((memory_size,), -1))
        self.register_buffer("trust", torch.zeros(memory_size, num_labels, dtype=torch.int8))
        self.register_buffer("total", torch.zeros(2, num_labels, embedding_dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(2, num_labels, dtype=torch.int64))

    @torch.no_grad()
    def remember(self, index: Tensor, rows: Tensor, label: Tensor, keep: Tensor) -> None:
        """Take in the rows of these samples; of several rows for a slot the last one counts.

        Args:
            index: ``(B,)`` dataset positions.
            rows: ``(B, D)`` float32 unit rows, finite.
            label: ``(B, L)`` 0 or 1.
            keep: ``(B, L)`` bool, labels to trust; a row without any empties its slot.
        """
        slot = index % self.memory_size
        source = last_writer(slot, torch.ones_like(slot, dtype=torch.bool))
        once = source == torch.arange(len(slot), device=slot.device)
        told = torch.where(keep, 2 * label.to(torch.int8) - 1, 0).to(torch.int8)[source]
        known = told.any(dim=1)
        new = on_grid(rows[source]).masked_fill_(~known.unsqueeze(1), 0.0)
        self._add(self.memory[slot], self.trust[slot], once, -1)
        self._add(new, told, once, 1)
        self.memory.index_copy_(0, slot, new)
        self.trust.index_copy_(0, slot, told)
        self.memory_index.index_copy_(0, slot, index[source].masked_fill(~known, -1))

    def _add(self, rows: Tensor, trust: Tensor, once: Tensor, sign: int) -> None:
        """Add rows ``(B, D)`` to the sums of their labels, or take them off."""
        for kind, value in enumerate((-1, 1)):
            member = (trust == value) & once.unsqueeze(1)
            self.total[kind] += sign * (member.double().T @ rows.double())
            self.count[kind] += sign * member.sum(dim=0)

    def means(self, rows: Tensor, index: Tensor) -> Tensor:
        """Mean products of rows with the memory's rows of each kind, without a sample's own row.

        Args:
            rows: ``(B, D)`` unit rows.
            index: ``(B,)`` whose they are.

        Returns:
            ``(2, B, L)`` float64, without and with the label; NaN where there is no other row.
        """
        slot = index % self.memory_size
        mine = (self.memory_index[slot] == index).unsqueeze(1)
        wide = rows.double()
        own = (wide * self.memory[slot].double()).sum(dim=1, keepdim=True)
        found = []
        for kind, value in enumerate((-1, 1)):
            member = mine & (self.trust[slot] == value)
            others = self.count[kind] - member.long()
            product = wide @ self.total[kind].T - own * member
            found.append(torch.where(others > 0, product / others.clamp_min(1), torch.nan))
        return torch.stack(found)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"memory_size={self.memory_size}, num_labels={self.trust.shape[1]}"
