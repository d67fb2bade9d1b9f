"""Heads that map backbone features to embeddings."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn

HeadName = Literal["linear", "mlp", "none"]
ProjectorName = Literal["simclr", "moco", "byol", "swav"]


class _Style(NamedTuple):
    layers: int
    norm: bool
    last_norm: bool
    hidden_bias: bool
    last_bias: bool


_PROJECTORS: dict[str, _Style] = {
    "simclr": _Style(3, norm=True, last_norm=True, hidden_bias=False, last_bias=False),
    "moco": _Style(2, norm=False, last_norm=False, hidden_bias=True, last_bias=True),
    "byol": _Style(2, norm=True, last_norm=False, hidden_bias=True, last_bias=False),
    "swav": _Style(2, norm=True, last_norm=False, hidden_bias=True, last_bias=True),
}


def _check_width(value: int | None, name: str) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


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
        ValueError: ``none`` with unequal sizes, or a size below 1.
    """
    _check_width(embedding_dim, "embedding_dim")
    _check_width(hidden_dim, "hidden_dim")
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


def projector(
    kind: ProjectorName,
    in_features: int,
    hidden_dim: int | None = None,
    out_dim: int = 128,
    layers: int | None = None,
) -> nn.Sequential:
    """Projection or prediction head ``(B, in_features) -> (B, out_dim)`` of a self-supervised method.

    ReLU follows every layer but the last. By kind (sources: the official code of each method):

    * ``simclr``: three layers without bias, batch norm after each, the last one's without offset
      (google-research/simclr, ``model_util.py``);
    * ``moco``: two layers with bias, no batch norm (MoCo-v2, ``main_moco.py --mlp``);
    * ``byol``: two layers, batch norm after the hidden one, no bias in the last (``utils/networks.py``);
      also the predictor;
    * ``swav``: two layers with bias, batch norm after the hidden one (``src/resnet50.py``).

    Args:
        kind: one of the above.
        in_features: size of the input.
        hidden_dim: size of the hidden layers; default ``in_features``.
        out_dim: size of the output, which is not normalised.
        layers: number of linear layers, at least 1; default as above.

    Raises:
        ValueError: unknown kind, fewer than one layer, or a size below 1.
    """
    if kind not in _PROJECTORS:
        raise ValueError(f"There is no projector '{kind}': choose one of {', '.join(_PROJECTORS)}.")
    style = _PROJECTORS[kind]
    layers = style.layers if layers is None else layers
    if layers < 1:
        raise ValueError(f"A projector needs at least 1 layer, got {layers}.")
    _check_width(hidden_dim, "The projector's hidden width (projector_hidden)")
    _check_width(out_dim, "The projector's output (projector_dim)")
    hidden = hidden_dim or in_features
    parts: list[nn.Module] = []
    width = in_features
    for _ in range(layers - 1):
        parts.append(nn.Linear(width, hidden, bias=style.hidden_bias))
        if style.norm:
            parts.append(nn.BatchNorm1d(hidden))
        parts.append(nn.ReLU(inplace=True))
        width = hidden
    parts.append(nn.Linear(width, out_dim, bias=style.last_bias))
    if style.last_norm:
        norm = nn.BatchNorm1d(out_dim)
        norm.bias.requires_grad_(False)  # stays 0: a batch norm without an offset
        parts.append(norm)
    return nn.Sequential(*parts)
