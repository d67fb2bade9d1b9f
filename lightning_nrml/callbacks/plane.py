"""Embeddings as points of the plane: PCA, t-SNE or UMAP."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np

Method = Literal["pca", "tsne", "umap"]
METHODS: tuple[Method, ...] = get_args(Method)


def pca(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal component analysis onto the first two components, in float64.

    The sign of a component is the one that makes its largest loading (by size) positive. Components that the
    rows do not vary along are 0.

    Args:
        rows: ``(n, D)`` finite numbers, n >= 1.

    Returns:
        ``(n, 2)`` coordinates and the ``(2,)`` shares of the variance, in [0, 1].
    """
    x = rows.astype(np.float64)
    rounding = 1e-12 * float((x**2).sum())
    x -= x.mean(axis=0)
    n, dim = x.shape
    # the smaller of both products has the same eigenvalues
    variance, vectors = np.linalg.eigh(x.T @ x if dim <= n else x @ x.T)
    total = max(float(variance.clip(min=0).sum()), np.finfo(np.float64).tiny)
    xy, share = np.zeros((n, 2)), np.zeros(2)
    for k in range(min(2, n, dim)):
        if variance[-1 - k] <= rounding:
            break
        loading = vectors[:, -1 - k] if dim <= n else x.T @ vectors[:, -1 - k]
        loading /= np.linalg.norm(loading) * np.sign(loading[np.abs(loading).argmax()])
        xy[:, k], share[k] = x @ loading, variance[-1 - k] / total
    return xy, share


def tsne(rows: np.ndarray, seed: int) -> np.ndarray:
    """t-distributed stochastic neighbour embedding by scikit-learn, started from the PCA.

    Source: van der Maaten and Hinton, JMLR 9, 2008. Perplexity 30, or a third of the other rows if there are
    fewer.

    Args:
        rows: ``(n, D)`` finite numbers, n >= 3.
        seed: of its generator.

    Returns:
        ``(n, 2)`` coordinates.
    """
    from sklearn.manifold import TSNE

    start = pca(rows)[0]
    start *= 1e-4 / max(float(start[:, 0].std()), np.finfo(np.float64).tiny)  # as scikit-learn does
    perplexity = min(30.0, (len(rows) - 1) / 3)
    found = TSNE(2, perplexity=perplexity, init=start.astype(np.float32), random_state=seed % 2**32)
    xy: np.ndarray = found.fit_transform(rows.astype(np.float32)).astype(np.float64)
    return xy


def umap(rows: np.ndarray, seed: int) -> np.ndarray:
    """Uniform manifold approximation and projection by the package umap-learn.

    Source: McInnes, Healy, Melville, arXiv 1802.03426. 15 neighbours, or as many as there are.

    Args:
        rows: ``(n, D)`` finite numbers, n >= 3.
        seed: of its generator.

    Returns:
        ``(n, 2)`` coordinates.
    """
    from umap import UMAP

    found = UMAP(n_components=2, n_neighbors=min(15, len(rows) - 1), random_state=seed % 2**32)
    xy: np.ndarray = np.asarray(found.fit_transform(rows.astype(np.float32)), dtype=np.float64)
    return xy


def project(rows: np.ndarray, method: Method, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """``(n, 2)`` float64 coordinates of ``(n, D)`` rows, and what the two axes are called."""
    if method == "pca":
        xy, share = pca(rows)
        return xy, (f"1st component, {share[0]:.0%} of the variance", f"2nd component, {share[1]:.0%}")
    return (tsne if method == "tsne" else umap)(rows, seed), ("", "")


def check_installed(method: Method) -> None:
    """See that what a map needs is there, before anything is trained.

    Raises:
        ImportError: matplotlib or, for UMAP, umap-learn is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            "EmbeddingMap draws with matplotlib, which is not installed: pip install 'lightning-nrml[plot]'"
        )
    if method == "umap" and find_spec("umap") is None:
        raise ImportError(
            "EmbeddingMap(method='umap') needs umap-learn, which is not installed: pip install umap-learn, "
            "or use method='pca' or 'tsne'"
        )
