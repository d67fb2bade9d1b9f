"""Exact nearest-neighbour search in chunks: the square similarity matrix never exists.

Tie rule of the torch back end: equal similarities are ordered by the smaller gallery row, also across
the k-th place, so the answer is a function of the similarities alone. (Two equal gallery rows can still
differ in the last bit of their computed similarity, as any blocked matrix product may round them.)
The faiss back end orders what faiss returns in the same way, but which of several equal rows get in at
the k-th place is faiss' choice.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_nrml.precision import exact_products

Backend = Literal["torch", "faiss"]
Similarity = Literal["cosine", "dot"]

# About the last-level cache of a server core; larger buffers made the scan slower, smaller ones the product.
_CPU_BUFFER_BYTES = 32 << 20
_GPU_BUFFER_BYTES = 512 << 20
_MAX_BLOCK = 16


def check_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and infinite rows.

    Raises:
        ValueError: naming the first bad rows of ``x`` ``(N, D)``.
    """
    bad = (~torch.isfinite(x).all(dim=1)).nonzero().flatten()
    if len(bad):
        first = ", ".join(str(i) for i in bad[:5].tolist())
        raise ValueError(
            f"{len(bad)} of {len(x)} rows of {name} contain NaN or infinity (first rows: {first}); "
            "remove them or look for a diverged training before you search."
        )


def prepare_rows(x: Tensor, similarity: Similarity = "cosine", name: str = "embedding") -> Tensor:
    """Check ``x`` ``(N, D)`` and return it in float32 (float64 stays), of unit length for ``"cosine"``.

    A zero row stays zero and so has cosine 0 with everything. Unit rows are a new tensor that lies in memory
    column by column: as a gallery that makes a CPU's products a fifth faster.

    Raises:
        ValueError: for a wrong shape, similarity, or non-finite rows.
    """
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (rows, dimensions), got {tuple(x.shape)}.")
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity must be 'cosine' or 'dot', got {similarity!r}.")
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    check_finite(x, name)
    if similarity == "dot":
        return x
    norm = torch.linalg.vector_norm(x, dim=1).clamp_min_(1e-12)
    return torch.div(x.T, norm, out=x.new_empty(x.shape[1], len(x))).T


class ExactIndex:
    """A gallery that answers exact top-k queries by inner product.

    Args:
        gallery: ``(N, D)`` prepared rows (see :func:`prepare_rows`), on any device. Not copied.
        backend: ``"torch"``, or ``"faiss"`` (a flat index on the CPU, in float32).
        chunk: most query rows scored at once; ``None`` sizes the reused buffer to about 32 MiB on CPU
            and 512 MiB on an accelerator.
    """

    def __init__(self, gallery: Tensor, backend: Backend = "torch", chunk: int | None = None) -> None:
        if backend not in ("torch", "faiss"):
            raise ValueError(f"backend must be 'torch' or 'faiss', got {backend!r}.")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 row, got {chunk}.")
        self.gallery = gallery
        self.chunk = chunk
        self.faiss_index = _faiss_index(gallery) if backend == "faiss" else None
        self._buffer: Tensor | None = None

    def chunk_rows(self, k: int) -> int:
        """Query rows to score at once when ``k`` neighbours are wanted: bounds buffer and results."""
        if self.chunk is not None:
            return self.chunk
        budget = _CPU_BUFFER_BYTES if self.gallery.device.type == "cpu" else _GPU_BUFFER_BYTES
        # per neighbour: a similarity, an index, and what a caller derives from the two
        row_bytes = self.gallery.element_size() * len(self.gallery) + 48 * min(k, len(self.gallery))
        return max(8, min(4096, budget // max(row_bytes, 1)))

    def search(self, query: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` most similar gallery rows of each row of one chunk of queries.

        Args:
            query: ``(c, D)`` prepared rows on the gallery's device; c is at most :meth:`chunk_rows`.
            k: neighbours wanted; fewer come back where the gallery is smaller.
            exclude: ``(c,)`` gallery row that a query must not find (itself), -1 for none.

        Returns:
            ``(similarity, index)``, both ``(c, min(k, N))``, best first; places that cannot be filled
            hold -inf and -1.
        """
        k = min(k, len(self.gallery))
        with torch.no_grad(), exact_products(self.gallery.device.type):
            if self.faiss_index is not None:
                value, index = self._search_faiss(query, k, exclude)
            else:
                value, index = self._search_torch(query, k, exclude)
            return value, index.masked_fill_(value == -torch.inf, -1)

    def _scores(self, query: Tensor, block: int) -> Tensor:
        """``(c, padded N)`` similarities in the reused buffer; padding holds -inf."""
        n = len(self.gallery)
        width = -(-n // block) * block
        need = len(query) * width
        if self._buffer is None or self._buffer.numel() < need:
            rows = max(len(query), 1)
            self._buffer = None  # free the old one first
            self._buffer = torch.empty(rows * width, dtype=self.gallery.dtype, device=self.gallery.device)
        scores = self._buffer[:need].view(len(query), width)
        torch.mm(query, self.gallery.T, out=scores[:, :n])
        scores[:, n:] = -torch.inf
        return scores

    def _search_torch(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        n = len(self.gallery)
        wanted = min(k + 1, n)  # one more shows whether a tie crosses the k-th place
        block = _block_size(n, wanted)
        scores = self._scores(query, block)
        if exclude is not None:
            row = (exclude >= 0).nonzero().flatten()
            scores[row, exclude[row]] = -torch.inf
        if block > 1:
            value, index = _top_of_blocks(scores, wanted, block)
        elif scores.device.type == "cpu" and scores.dtype == torch.float32:
            return _top_by_keys(scores, k)
        else:
            value, index = scores.topk(wanted, dim=1)
        if wanted > k:
            tied = ((value[:, k - 1] == value[:, k]) & (value[:, k] > -torch.inf)).nonzero().flatten()
            value, index = value[:, :k], index[:, :k]
            # a quarter of the buffer at a time: a collapsed model ties everywhere
            for rows in tied.split(max(1, len(query) // 4)):
                index[rows] = _smallest_tied(scores[rows, :n], value[rows], index[rows])
        return _order_ties(value, index)

    def _search_faiss(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        wanted = min(k + (exclude is not None), len(self.gallery))
        rows = query.float().cpu().numpy()
        assert self.faiss_index is not None
        found, ids = self.faiss_index.search(rows, wanted)
        value, index = torch.from_numpy(found), torch.from_numpy(ids)
        if exclude is not None:
            itself = index == exclude.cpu()[:, None]
            value.masked_fill_(itself, -torch.inf)
            order = itself.to(torch.uint8).sort(dim=1, stable=True).indices[:, :k]
            value, index = value.gather(1, order), index.gather(1, order)
        value, index = _order_ties(value, index)
        return value.to(query.device), index.to(query.device)


def _faiss_index(gallery: Tensor) -> Any:
    """A flat inner-product index over the gallery (a float32 copy in host memory)."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='faiss' needs faiss-cpu or faiss-gpu; install one or use 'torch'."
        ) from error
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.float().cpu().numpy())
    return index


def _block_size(n: int, wanted: int) -> int:
    """Gallery rows per block (1 = do without): both n / b maxima and wanted * b candidates stay few."""
    if 64 * wanted > n:
        return 1
    block = 4
    while block < _MAX_BLOCK and (2 * block) ** 2 * wanted <= 2 * n:
        block *= 2
    return block


def _top_of_blocks(scores: Tensor, wanted: int, block: int) -> tuple[Tensor, Tensor]:
    """Top ``wanted`` of each row through the blocks with the largest maxima.

    Exact: an entry of any other block is at most that block's maximum, which the maxima of the
    ``wanted`` chosen blocks all reach or pass. A block is a comb of the row, entries b, b + n, b + 2n, ...
    with n the number of blocks, so that the maxima are taken over whole vectors.
    """
    rows, width = scores.shape
    number = width // block
    combs = scores.view(rows, block, number)
    best = combs.amax(dim=1).topk(wanted, dim=1, sorted=False).indices
    candidates = combs.gather(2, best[:, None, :].expand(-1, block, -1)).flatten(1)
    value, place = candidates.topk(wanted, dim=1)
    return value, best.gather(1, place % wanted) + place.div(wanted, rounding_mode="floor") * number


def _top_by_keys(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top ``k`` of float32 rows on the CPU where k is a large part of the row.

    Similarity and gallery row are packed into one integer, ascending from the best, and NumPy's
    vectorised selection and sort run on that: 5 to 10 times faster than ``torch.topk`` there, and ties
    come out by the smaller row by themselves.
    """
    n = scores.shape[1]
    index = torch.empty(len(scores), k, dtype=torch.int64)
    column = torch.arange(n)
    # some rows at a time, so that the passes run in the cache
    for first in range(0, len(scores), step := max(1, (1 << 19) // n)):
        rows = slice(first, first + step)
        bits = scores[rows].add_(0.0).view(torch.int32)  # + 0 makes -0 equal to 0
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers that rise with the float
        keys = order.bitwise_not_().long().bitwise_left_shift_(32).bitwise_or_(column).numpy()
        if 2 * k < n:
            keys.partition(k, axis=1)
        top = keys[:, :k] if 2 * k < n else keys
        top.sort(axis=1)
        index[rows] = torch.from_numpy(top[:, :k]) & 0xFFFFFFFF
    return scores.gather(1, index), index


def _smallest_tied(scores: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Refill the places that hold the k-th similarity with the smallest gallery rows that have it.

    Args:
        scores: ``(t, N)`` similarities of the rows in which a tie crosses the k-th place.
        value: ``(t, k)`` top similarities, descending.
        index: ``(t, k)`` their gallery rows.
    """
    k = value.shape[1]
    last = value[:, -1:]
    key = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device).neg_()
    key = torch.where(scores == last, key, torch.iinfo(torch.int32).min)
    smallest = key.topk(k, dim=1).values.neg().long()
    sure = (value > last).sum(dim=1, keepdim=True)
    place = torch.arange(k, device=scores.device) - sure
    return torch.where(place >= 0, smallest.gather(1, place.clamp(min=0)), index)


def _order_ties(value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Sort equal similarities by gallery row, in the rows that have any."""
    tied = (value[:, 1:] == value[:, :-1]).any(dim=1).nonzero().flatten()
    if not len(tied):
        return value, index
    some, order = index[tied].sort(dim=1)
    similarity, again = value[tied].gather(1, order).sort(dim=1, descending=True, stable=True)
    value[tied], index[tied] = similarity, some.gather(1, again)
    return value, index


def topk_search(
    query: Tensor,
    gallery: Tensor,
    k: int,
    *,
    exclude: Tensor | None = None,
    similarity: Similarity = "cosine",
    chunk: int | None = None,
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor]:
    """Exact ``k`` nearest gallery rows of every query, in chunks.

    Args:
        query: ``(Q, D)`` floating point, any device; half precisions are searched in float32.
        gallery: ``(N, D)`` on the same device.
        k: neighbours per query, at least 1.
        exclude: ``(Q,)`` int64 gallery row that a query must not find (itself), -1 for none.
        similarity: ``"cosine"`` (rows are normalised here) or ``"dot"``.
        chunk: query rows at once; ``None`` picks a size with a bounded buffer.
        backend: ``"torch"`` or ``"faiss"``.

    Returns:
        ``(similarity, index)``, both ``(Q, min(k, N))``, best first, ties by the smaller index; places
        that cannot be filled hold -inf and -1.

    Raises:
        ValueError: for wrong shapes or NaN/infinite rows (naming the first ones).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    same = query is gallery
    gallery = prepare_rows(gallery, similarity, "gallery")
    query = gallery if same else prepare_rows(query, similarity, "query").to(gallery.dtype)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query has {query.shape[1]} dimensions but gallery has {gallery.shape[1]}.")
    if exclude is not None and exclude.shape != query.shape[:1]:
        raise ValueError(f"exclude must have shape ({len(query)},), got {tuple(exclude.shape)}.")
    index = ExactIndex(gallery, backend, chunk)
    k = min(k, len(gallery))
    value = gallery.new_empty(len(query), k)
    found = torch.empty(len(query), k, dtype=torch.int64, device=gallery.device)
    step = index.chunk_rows(k)
    for start in range(0, len(query) if k else 0, step):
        rows = slice(start, start + step)
        value[rows], found[rows] = index.search(query[rows], k, None if exclude is None else exclude[rows])
    return value, found
