"""A ring of labelled features that always knows the mean of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrml.state import StateModule

# Rows enter the memory rounded to multiples of 2^-30, finer than float32 resolves unit rows where it
# matters. Float64 sums of up to 2^23 such rows are exact: adding and taking off rows never drifts, does
# not depend on the order of additions (equal on all ranks), and equals a rebuilt sum bit for bit.
_GRID = 2.0**30
_MAX_MEMORY = 2**23


def on_grid(rows: Tensor) -> Tensor:
    """Copies of unit rows ``(B, D)`` float32 whose sums in float64 are exact."""
    return rows.mul(_GRID).round_().div_(_GRID)


class ClassSums(StateModule):
    """Rows of labelled unit features in numbered slots, and the centre of each class; see subclasses.

    Attributes:
        memory: ``(M, D)`` float32 unit rows. memory_label: ``(M,)`` int64, -1 = empty.
        centers: ``(C, D)`` float32, zero without rows. filled: ``(C,)`` bool, has a centre.
        class_sum: ``(C, D)`` float64, sum of each class's rows. class_count: ``(C,)`` int64, their number.

    Raises:
        ValueError: for a size outside its range.
    """

    memory: Tensor
    memory_label: Tensor
    centers: Tensor
    filled: Tensor
    class_sum: Tensor
    class_count: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, memory_size: int) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim, "memory_size": memory_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if memory_size > _MAX_MEMORY:
            raise ValueError(f"memory_size must be at most {_MAX_MEMORY}, got {memory_size}.")
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.memory_size = memory_size
        self.register_buffer("memory", torch.zeros(memory_size, embedding_dim, dtype=torch.float32))
        self.register_buffer("memory_label", torch.full((memory_size,), -1))
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim, dtype=torch.float32))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("class_sum", torch.zeros(num_classes, embedding_dim, dtype=torch.float64))
        self.register_buffer("class_count", torch.zeros(num_classes, dtype=torch.int64))

    def unit_rows(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised float32 rows ``(B, D)``, which are finite ``(B,)``, and have a class with a centre.

        Raises:
            ValueError: if a shape does not fit, or a label is not a class (checked on the CPU only).
        """
        rows = embedding.float()
        if rows.ndim != 2 or rows.shape[1] != self.embedding_dim or label.shape != rows.shape[:1]:
            raise ValueError(
                f"{type(self).__name__} needs embeddings (B, {self.embedding_dim}) and one class label per "
                f"row; got embeddings {tuple(rows.shape)} and labels {tuple(label.shape)}. Set embedding_dim "
                "to match."
            )
        try:
            has_center = self.filled.index_select(0, label)
        except IndexError:  # on the CPU only
            raise label_error(label, self.num_classes) from None
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        finite = (norm < torch.inf).squeeze(1)  # False for NaN, too
        return rows / norm.clamp_min_(1e-12), finite, finite & has_center

    def put(self, slot: Tensor, rows: Tensor, label: Tensor, once: Tensor | None = None) -> None:
        """Replace the rows in these slots, and refresh the centres concerned.

        Args:
            slot: ``(B,)`` int64 in ``0..M-1``.
            rows: ``(B, D)`` float32 unit rows. label: ``(B,)``, -1 with a row of zeros = empty.
            once: ``(B,)`` bool, True for one row of each slot, if slots repeat (with equal rows and labels).
        """
        old, old_label = self.memory.index_select(0, slot), self.memory_label.index_select(0, slot)
        self.memory.index_copy_(0, slot, rows)
        self.memory_label.index_copy_(0, slot, label)
        labels = torch.cat([old_label, label])
        sign = (labels >= 0).long()  # an empty row is zero and counts 0, whatever class we put it in
        sign[: len(old)].neg_()
        change = torch.cat([old.neg_(), rows]).double()
        if once is not None:
            twice = once.repeat(2)
            sign, change = sign * twice, change * twice.unsqueeze(1)
        classes = labels.clamp_min_(0)
        self.class_sum.index_add_(0, classes, change)
        self.class_count.index_add_(0, classes, sign)
        self._refresh(classes)

    def _refresh(self, classes: Tensor) -> None:
        """Recompute the centres of these classes from the running sums; repeats are harmless."""
        rows = self.class_count.index_select(0, classes)
        mean = self.class_sum.index_select(0, classes).div_(rows.clamp_min(1).unsqueeze(1))
        self.centers.index_copy_(0, classes, mean.float())
        self.filled.index_copy_(0, classes, rows > 0)

    @torch.no_grad()
    def rebuild(self) -> None:
        """Recompute sums and centres from the memory; needed only after editing the memory by hand."""
        used = self.memory_label >= 0
        classes = self.memory_label.clamp_min(0)
        self.class_sum.zero_().index_add_(0, classes, self.memory.double() * used.unsqueeze(1))
        self.class_count.zero_().index_add_(0, classes, used.long())
        self._refresh(torch.arange(self.num_classes, device=classes.device))


class CenterMemory(ClassSums):
    """The newest ``memory_size`` unit features with their labels, and the centre of each class.

    The centre is the plain mean of the class's rows (its length tells their spread), refreshed whenever one
    of them comes or goes; a class without rows loses it. A write costs the same for every memory size, and
    nothing waits for the device.

    Args:
        num_classes: number of classes ``C``; labels lie in ``0..C-1``.
        embedding_dim: embedding size ``D``.
        memory_size: rows ``M`` of the memory.

    Attributes:
        memory, memory_label, centers, filled, class_sum, class_count: see :class:`ClassSums`.
        pointer, count: 0-d int64: next row to write, rows in use.
    """

    pointer: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, memory_size: int) -> None:
        super().__init__(num_classes, embedding_dim, memory_size)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @property
    def count(self) -> Tensor:
        """0-d int64, rows in use."""
        return (self.memory_label >= 0).sum()

    def remember(self, rows: Tensor, label: Tensor, keep: Tensor) -> None:
        """Write the kept ones of unit rows ``(B, D)`` into the ring, oldest rows first to go."""
        keep = keep.to(rows.device)
        write = self._write_on_host if keep.is_cpu else self._write_on_device
        if len(rows) <= self.memory_size:
            write(rows, label, keep)
            return
        chunks = (x.split(self.memory_size) for x in (rows, label, keep))
        for part in zip(*chunks, strict=True):
            write(*part)

    # Ring writes of the kept ones of at most M rows. Only on the host may shapes depend on values.

    def _write_on_host(self, rows: Tensor, label: Tensor, keep: Tensor) -> None:
        order = keep.nonzero().squeeze(1)
        start, end = int(self.pointer), int(self.pointer) + len(order)
        slot = torch.arange(start, end, device="cpu")
        if end > self.memory_size:
            slot.remainder_(self.memory_size)
        self.put(slot, on_grid(rows.index_select(0, order)), label.index_select(0, order))
        self.pointer.fill_(end % self.memory_size)

    def _write_on_device(self, rows: Tensor, label: Tensor, keep: Tensor) -> None:
        # fixed shapes: dropped rows come last and rewrite what is there already
        order = keep.byte().argsort(stable=True, descending=True)
        kept, place = keep.sum(), torch.arange(len(order), device=order.device)
        slot, fresh = place.add(self.pointer).remainder_(self.memory_size), place < kept
        new = on_grid(rows.index_select(0, order))
        new = torch.where(fresh.unsqueeze(1), new, self.memory.index_select(0, slot))
        old_label = self.memory_label.index_select(0, slot)
        self.put(slot, new, torch.where(fresh, label.index_select(0, order), old_label))
        self.pointer.add_(kept).remainder_(self.memory_size)


class SampleCenters(ClassSums):
    """The last trusted unit feature of every training sample, and the centre of each class.

    As each sample has its own slot, a sample can be compared with its class *without itself*: otherwise a
    wrongly labelled one votes for its own wrong label, which counts in classes of few images.

    Args:
        num_classes: number of classes ``C``; labels lie in ``0..C-1``.
        embedding_dim: embedding size ``D``.
        num_samples: training samples ``N``.
    """

    def __init__(self, num_classes: int, embedding_dim: int, num_samples: int) -> None:
        super().__init__(num_classes, embedding_dim, num_samples)

    def remember(self, index: Tensor, rows: Tensor, label: Tensor, keep: Tensor) -> None:
        """Take in the kept unit rows ``(B, D)`` of these samples; the others lose their old ones.

        A sample that is twice in the batch counts once, as it came last.
        """
        final, once = last_of_each(index)
        rows, label, keep = rows[final], label[final], keep[final]
        new = on_grid(rows).masked_fill_(~keep.unsqueeze(1), 0.0)
        self.put(index, new, label.masked_fill(~keep, -1), once)

    def without_self(self, index: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``(B, D)`` float64 and number ``(B,)`` of the class's rows but for the sample's own."""
        own = self.memory_label.index_select(0, index) == label
        total = self.class_sum.index_select(0, label)
        total = total - self.memory.index_select(0, index).double() * own.unsqueeze(1)
        return total, self.class_count.index_select(0, label) - own.long()


def last_of_each(index: Tensor) -> tuple[Tensor, Tensor]:
    """For repeated entries of ``index (B,)``: where each one came last ``(B,)``, and whether that is here."""
    place = torch.arange(len(index), device=index.device)
    if not len(index):
        return place, place.bool()
    final = ((index.unsqueeze(1) == index.unsqueeze(0)) * (place + 1)).amax(dim=1) - 1
    return final, final == place


def label_error(label: Tensor, num_classes: int) -> ValueError:
    """The sentence for labels outside ``0..num_classes-1``."""
    bad = label[(label < 0) | (label >= num_classes)][0]
    return ValueError(
        f"label {int(bad)} is outside 0..{num_classes - 1}; "
        "set num_classes of the filter to the number of classes of the training set."
    )
