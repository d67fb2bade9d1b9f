"""Retrieval metrics of deep metric learning: Recall@K, R-precision, MAP@R.

Definitions: Musgrave et al., "A Metric Learning Reality Check" (ECCV 2020), section 4.2. With rel_k = 1 if
the k-th neighbour has the query's label and R = number of gallery items with that label (the query itself
not counted)::

    Recall@K    = 1 if any of rel_1..rel_K            (a hit rate; Recall@1 = precision@1)
    R-precision = (1/R) sum_{k<=R} rel_k
    MAP@R       = (1/R) sum_{k<=R} rel_k P(k),   P(k) = (1/k) sum_{j<=k} rel_j

Queries without a relevant gallery item (R = 0) are left out of every average and counted in
``num_skipped``; the query itself is dropped by index, so duplicates of it stay in its ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_nrml.metrics.search import Backend, ExactIndex, prepare_rows

Average = Literal["query", "class"]


def retrieval_metrics(
    embedding: Tensor,
    label: Tensor,
    ks: Sequence[int] = (1, 2, 4, 8),
    query: Tensor | None = None,
    gallery: Tensor | None = None,
    chunk: int | None = None,
    backend: Backend = "torch",
    average: Average = "query",
) -> dict[str, float]:
    """Recall@K, R-precision and MAP@R by cosine similarity, exact, in bounded memory.

    Args:
        embedding: ``(N, D)`` rows of any length (normalised here in float32; float64 stays), any device.
        label: ``(N,)`` integer class ids of any size.
        ks: the K of Recall@K.
        query: bool mask ``(N,)`` or int64 rows of the queries; ``None`` = all rows.
        gallery: bool mask ``(N,)`` or int64 rows (unique) of the gallery; ``None`` = all rows. A query
            that is in the gallery does not find itself.
        chunk: query rows scored at once; ``None`` picks a size with a buffer of about 32 MiB.
        backend: ``"torch"`` or ``"faiss"`` (CPU, float32).
        average: ``"query"`` = mean over queries; ``"class"`` = mean over classes of the class means.

    Returns:
        ``recall@k`` for each k, ``map@r``, ``r_precision`` in [0, 1] (NaN if no query counts),
        ``num_queries`` that count and ``num_skipped`` without a relevant item.

    Raises:
        ValueError: for shapes that do not fit, NaN/infinite rows, or bad arguments.
    """
    ks = _check_arguments(embedding, label, ks, average)
    rows = prepare_rows(embedding)
    label = label.to(rows.device)
    query_row = _rows_of(query, label, "query")
    gallery_row = _rows_of(gallery, label, "gallery")
    # float32 or faiss never see the ids: re-mapped to 0..C-1, large ones cannot merge
    classes, label = label.unique(return_inverse=True)
    count = torch.bincount(label if gallery_row is None else label[gallery_row], minlength=len(classes))
    place = _gallery_place(gallery_row, len(label), rows.device)

    query_row = torch.arange(len(label), device=rows.device) if query_row is None else query_row
    relevant = count[label[query_row]] - (place[query_row] >= 0).long()
    skipped = int((relevant == 0).sum())
    # frequent classes first: each chunk asks only for as many neighbours as its own largest R
    order = relevant.argsort(descending=True, stable=True)[: len(query_row) - skipped]
    query_row, relevant = query_row[order], relevant[order]

    # selected by column of the transpose, which keeps the layout of prepare_rows
    chosen = rows if gallery_row is None else rows.T.index_select(1, gallery_row).T
    index = ExactIndex(chosen, backend, chunk)
    gallery_label = label if gallery_row is None else label[gallery_row]
    value = _per_query(index, rows, query_row, label, gallery_label, relevant, place, ks)
    mean = _average(value, label[query_row], len(classes), average)
    names = [*(f"recall@{k}" for k in ks), "map@r", "r_precision"]
    result = dict(zip(names, mean.tolist(), strict=True))
    return result | {"num_queries": len(query_row), "num_skipped": skipped}


def _check_arguments(embedding: Tensor, label: Tensor, ks: Sequence[int], average: str) -> tuple[int, ...]:
    if embedding.ndim != 2 or label.shape != embedding.shape[:1]:
        raise ValueError(
            f"embedding must be (N, D) and label (N,), got {tuple(embedding.shape)} and {tuple(label.shape)}."
        )
    if label.is_floating_point() or label.is_complex():
        raise ValueError(f"label must hold integers, got {label.dtype}; floats merge ids above 2**24.")
    if average not in ("query", "class"):
        raise ValueError(f"average must be 'query' or 'class', got {average!r}.")
    ks = tuple(dict.fromkeys(int(k) for k in ks))
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be positive integers, got {ks}.")
    return ks


def _rows_of(choice: Tensor | None, label: Tensor, name: str) -> Tensor | None:
    """Row numbers from a mask or row numbers; ``None`` stays (all rows, without a copy of them)."""
    if choice is None:
        return None
    choice = choice.to(label.device)
    if choice.dtype == torch.bool:
        if choice.shape != label.shape:
            raise ValueError(f"the mask {name} must have shape ({len(label)},), got {tuple(choice.shape)}.")
        return choice.nonzero().flatten()
    if choice.ndim != 1 or choice.is_floating_point():
        raise ValueError(f"{name} must be a bool mask or a 1-d integer tensor of rows, got {choice.dtype}.")
    choice = choice.long()
    if len(choice) and (int(choice.min()) < 0 or int(choice.max()) >= len(label)):
        raise ValueError(f"{name} names rows outside 0..{len(label) - 1}.")
    if name == "gallery" and len(choice.unique()) < len(choice):
        raise ValueError("gallery names a row twice; a query could then find its own copy. Make it unique.")
    return choice


def _gallery_place(gallery_row: Tensor | None, n: int, device: torch.device) -> Tensor:
    """``(N,)`` position of each row in the gallery, -1 where it is not in it."""
    if gallery_row is None:
        return torch.arange(n, device=device)
    place = torch.full((n,), -1, device=device)
    place[gallery_row] = torch.arange(len(gallery_row), device=device)
    return place


def _per_query(
    index: ExactIndex,
    rows: Tensor,
    query_row: Tensor,
    label: Tensor,
    gallery_label: Tensor,
    relevant: Tensor,
    place: Tensor,
    ks: tuple[int, ...],
) -> Tensor:
    """``(Q, len(ks) + 2)`` recall@k..., MAP@R, R-precision of each query; ``relevant`` descends."""
    table = torch.empty(len(query_row), len(ks) + 2, device=rows.device)
    start = 0
    while start < len(query_row):
        wanted = max(int(relevant[start]), *ks)
        part = slice(start, start + index.chunk_rows(wanted))
        mine = query_row[part]
        _, found = index.search(rows[mine], wanted, place[mine])
        # an unfilled place (-1) comes after all R relevant items, where it changes nothing
        hit = gallery_label[found] == label[mine, None]
        for column, k in enumerate(ks):
            table[part, column] = hit[:, :k].any(dim=1).float()
        table[part, -2], table[part, -1] = _map_and_precision_at_r(hit, relevant[part])
        start = part.stop
    return table


def _map_and_precision_at_r(hit: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """MAP@R and R-precision, both ``(c,)``, from hits ``(c, k)`` in rank order, k >= max R."""
    width = int(relevant.max())
    rank = torch.arange(1, width + 1, device=hit.device)
    hit = hit[:, :width] & (rank <= relevant[:, None])
    precision = hit.cumsum(dim=1, dtype=torch.float32).div_(rank).mul_(hit)
    return precision.sum(dim=1) / relevant, hit.sum(dim=1) / relevant


def _average(value: Tensor, label: Tensor, num_classes: int, average: str) -> Tensor:
    """Mean over queries, or over the classes that have queries; NaN without any."""
    value = value.double()
    if average == "query":
        return value.mean(dim=0)
    count = torch.bincount(label, minlength=num_classes)
    total = value.new_zeros(num_classes, value.shape[1]).index_add_(0, label, value)
    return (total[count > 0] / count[count > 0, None]).mean(dim=0)


class RetrievalMetrics(Metric):
    """:func:`retrieval_metrics` accumulated over batches and ranks.

    Every rank computes the result from the rows of all ranks. Pass ``index`` (positions in the evaluated
    split) when a distributed sampler may repeat rows: each index then counts once.

    Args:
        ks: the K of Recall@K.
        backend: ``"torch"`` or ``"faiss"``.
        average: ``"query"`` or ``"class"``.
        chunk: query rows scored at once.
        **kwargs: further arguments of :class:`torchmetrics.Metric` (``compute_on_cpu``, ...).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    embedding: list[Tensor] | Tensor
    label: list[Tensor] | Tensor
    index: list[Tensor] | Tensor
    dim: Tensor

    def __init__(
        self,
        ks: Sequence[int] = (1, 2, 4, 8),
        backend: Backend = "torch",
        average: Average = "query",
        chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        self.backend: Backend = backend
        self.average: Average = average
        self.chunk = chunk
        # flattened rows plus their width: a rank without rows cannot know the width, yet must gather
        self.add_state("embedding", default=[], dist_reduce_fx="cat")
        self.add_state("label", default=[], dist_reduce_fx="cat")
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("dim", default=torch.tensor(0), dist_reduce_fx="max")

    def update(self, embedding: Tensor, label: Tensor, index: Tensor | None = None) -> None:
        """Add rows.

        Args:
            embedding: ``(B, D)`` of any floating dtype; kept in float32.
            label: ``(B,)`` integer class ids.
            index: ``(B,)`` integer positions in the evaluated split; ``None`` = all rows are distinct.
        """
        _check_arguments(embedding, label, self.ks, self.average)
        if index is not None and index.shape != label.shape:
            raise ValueError(f"index must have shape {tuple(label.shape)}, got {tuple(index.shape)}.")
        if int(self.dim) not in (0, embedding.shape[1]):
            raise ValueError(
                f"embedding has {embedding.shape[1]} dimensions, earlier batches {int(self.dim)}."
            )
        index = torch.full_like(label, -1, dtype=torch.int64) if index is None else index
        assert isinstance(self.embedding, list)
        assert isinstance(self.label, list)
        assert isinstance(self.index, list)
        self.dim.fill_(embedding.shape[1])
        self.embedding.append(embedding.detach().float().flatten())
        self.label.append(label.detach().long())
        self.index.append(index.detach().long())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states; a rank without rows takes part with empty ones of the right dtype."""
        if not len(self.label):
            self.embedding = [torch.empty(0, device=self.device)]
            self.label = [torch.empty(0, dtype=torch.int64, device=self.device)]
            self.index = [torch.empty(0, dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(embedding (N, D), label (N,), index (N,))`` so far; of rows with one index, the first."""
        label, index = _cat(self.label, torch.int64), _cat(self.index, torch.int64)
        embedding = _cat(self.embedding, torch.float32).view(len(label), max(int(self.dim), 1))
        keep = _first_of_each(index)
        return (embedding, label, index) if keep is None else (embedding[keep], label[keep], index[keep])

    def compute(self) -> dict[str, float]:
        """The result of :func:`retrieval_metrics` over all rows."""
        embedding, label, _ = self.rows()
        return retrieval_metrics(
            embedding, label, self.ks, chunk=self.chunk, backend=self.backend, average=self.average
        )


def _cat(state: list[Tensor] | Tensor, dtype: torch.dtype) -> Tensor:
    """A list state as one tensor; after a sync it is one already."""
    return state if isinstance(state, Tensor) else torch.cat(state) if state else torch.empty(0, dtype=dtype)


def _first_of_each(index: Tensor) -> Tensor | None:
    """Rows in which an index occurs for the first time, in row order; ``None`` if nothing repeats.

    Rows without an index (-1) are all kept.
    """
    known = (index >= 0).nonzero().flatten()
    value, order = index[known].sort(stable=True)
    first = torch.ones_like(value, dtype=torch.bool)
    first[1:] = value[1:] != value[:-1]
    if bool(first.all()):
        return None
    return torch.cat([known[order[first]], (index < 0).nonzero().flatten()]).sort().values
