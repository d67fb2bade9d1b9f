"""Heads that map backbone features to embeddings."""

from __future__ import annotations

from typing import Literal

from torch import nn

HeadName = Literal["linear", "mlp", "none"]


def create_head(
    kind: HeadName, in_features: int, embedding_dim: int, hidden_dim: int | None = None
) -> nn.Module:
    """Embedding head ``(B, in_features) -> (B, embedding_dim)``, not normalised.

    Args:
        kind: ``linear`` (the usual one in metric learning), ``mlp`` (linear, batch norm, ReLU, linear)
            or ``none`` (identity; needs ``embedding_dim == in_features``).
        in_features: size of the backbone's features.
        embedding_dim: size of the embedding.
        hidden_dim: hidden size of ``mlp``; default ``in_features``.

    Raises:
        ValueError: ``none`` with unequal sizes.
    """
    if kind == "linear":
        return nn.Linear(in_features, embedding_dim)
    if kind == "mlp":
        hidden = hidden_dim or in_features
        return nn.Sequential(
            nn.Linear(in_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, embedding_dim),
        )
    if in_features != embedding_dim:
        raise ValueError(
            f"head 'none' needs embedding_dim = {in_features}, the size of the backbone's features."
        )
    return nn.Identity()
