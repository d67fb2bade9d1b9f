"""Weighted nearest-neighbour classification on frozen embeddings."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from lightning_nrml.metrics.search import Backend, ExactIndex, prepare_rows


class KNNClassifier:
    """k-NN classifier by cosine similarity, each neighbour voting with weight exp(similarity / T).

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
    (CVPR 2018), section 3.4; k = 200 and T = 0.07 there.

    Args:
        k: neighbours that vote (all, if the bank is smaller).
        temperature: T > 0; ``float("inf")`` lets every neighbour count the same.
        chunk: query rows scored at once; ``None`` picks a size with a bounded buffer.
        backend: ``"torch"`` or ``"faiss"``.
    """

    def __init__(
        self, k: int = 20, temperature: float = 0.07, chunk: int | None = None, backend: Backend = "torch"
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.k = k
        self.temperature = temperature
        self.chunk = chunk
        self.backend: Backend = backend
        self.classes: Tensor | None = None
        self._index: ExactIndex | None = None
        self._label = torch.empty(0, dtype=torch.int64)

    def fit(self, bank: Tensor, label: Tensor) -> Self:
        """Remember the bank.

        Args:
            bank: ``(N, D)`` embeddings of any length, N >= 1, on the device to work on.
            label: ``(N,)`` integer class ids.

        Raises:
            ValueError: for shapes that do not fit, an empty bank, or NaN/infinite rows.
        """
        if bank.ndim != 2 or label.shape != bank.shape[:1] or not len(bank):
            raise ValueError(
                f"bank must be (N, D) with N >= 1 and label (N,), got {tuple(bank.shape)} and "
                f"{tuple(label.shape)}."
            )
        rows = prepare_rows(bank, name="bank")
        self.classes, self._label = label.to(rows.device).unique(return_inverse=True)
        self._index = ExactIndex(rows, self.backend, self.chunk)
        return self

    def predict(self, query: Tensor, exclude: Tensor | None = None) -> Tensor:
        """``(Q,)`` predicted class ids; equal votes go to the smaller id.

        Args:
            query: ``(Q, D)`` embeddings of any length.
            exclude: ``(Q,)`` bank row that must not vote (the query itself), -1 for none.
        """
        return self._vote(query, exclude, scores=False)[0]

    def predict_scores(self, query: Tensor, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`predict` and the ``(Q, C)`` shares of the votes, columns as in ``self.classes``.

        The shares of a row sum to 1 (to 0 if nothing may vote).
        """
        return self._vote(query, exclude, scores=True)

    def _vote(self, query: Tensor, exclude: Tensor | None, scores: bool) -> tuple[Tensor, Tensor]:
        if self._index is None or self.classes is None:
            raise RuntimeError("KNNClassifier has no bank yet; call fit(bank, label) before predict(query).")
        gallery = self._index.gallery
        query = prepare_rows(query, name="query").to(gallery)
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(f"query has {query.shape[1]} dimensions but the bank has {gallery.shape[1]}.")
        if exclude is not None and exclude.shape != query.shape[:1]:
            raise ValueError(f"exclude must have shape ({len(query)},), got {tuple(exclude.shape)}.")
        exclude = None if exclude is None else exclude.to(gallery.device)
        winner = torch.empty(len(query), dtype=torch.int64, device=gallery.device)
        table = gallery.new_empty(len(query) if scores else 0, len(self.classes))
        # a row of votes costs as much as that many neighbours
        step = self._index.chunk_rows(self.k + len(self.classes) // 8)
        for start in range(0, len(query), step):
            rows = slice(start, start + step)
            near, found = self._index.search(query[rows], self.k, None if exclude is None else exclude[rows])
            # relative to the best one: exp(1 / T) alone overflows below T = 0.012
            # (unfilled places hold -inf and get no weight)
            weight = ((near - near[:, :1]) / self.temperature).exp().nan_to_num_(0)
            votes = weight.new_zeros(len(near), len(self.classes))
            votes.scatter_add_(1, self._label[found.clamp(min=0)], weight)
            winner[rows] = votes.argmax(dim=1)
            if scores:
                table[rows] = votes / weight.sum(dim=1, keepdim=True).clamp_(min=1e-12)
        return self.classes[winner], table
