"""PCA against numpy's SVD; t-SNE and UMAP: what goes in and comes out."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_nrml.callbacks import plane
from lightning_nrml.callbacks.plane import check_installed, pca, project, tsne


def cloud(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, dim)) * np.linspace(3, 0.1, dim) + 5).astype(np.float32)


@pytest.mark.parametrize(("n", "dim"), [(200, 12), (9, 40), (3, 3), (50, 2)])
def test_pca_is_that_of_the_svd(n: int, dim: int) -> None:
    rows = cloud(n, dim)
    x = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    xy, share = pca(rows)
    for k in range(2):
        sign = np.sign(vt[k, np.abs(vt[k]).argmax()])
        np.testing.assert_allclose(xy[:, k], sign * u[:, k] * s[k], atol=1e-8)
    np.testing.assert_allclose(share, s[:2] ** 2 / (s**2).sum(), rtol=1e-9)


def test_pca_keeps_its_sign_and_forgets_shifts() -> None:
    rows = cloud(60, 5)
    xy, _ = pca(rows)
    np.testing.assert_allclose(pca(rows + np.float32(2))[0], xy, atol=1e-5)
    np.testing.assert_allclose(pca(rows[::-1])[0][::-1], xy, atol=1e-9)
    wide = np.pad(rows, ((0, 0), (0, 200)))  # through the other product
    np.testing.assert_allclose(pca(wide)[0], xy, atol=1e-9)


def test_pca_of_rows_that_do_not_vary() -> None:
    same = np.repeat(cloud(1, 7), 10, axis=0)
    for rows in (same, same[:1], np.zeros((4, 3), np.float32)):
        xy, share = pca(rows)
        assert not xy.any()
        assert share.tolist() == [0, 0]
    xy, share = pca(np.array([[1.0], [3.0]], np.float32))
    assert xy.tolist() == [[-1, 0], [1, 0]]
    assert share.tolist() == [1, 0]


def test_tsne_parts_groups_and_takes_no_random_number_from_elsewhere() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(12, 6)) + 8, rng.normal(size=(12, 6)) - 8]).astype(np.float32)
    np.random.seed(3)  # noqa: NPY002 - the global generator is what must stay
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    xy = tsne(rows, seed=5)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert np.array_equal(tsne(rows, seed=5), xy)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    nearest = (distance + 1e9 * np.eye(24)).argmin(1)
    assert np.array_equal(nearest >= 12, np.arange(24) >= 12)
    for few in (rows[:3], rows[:5, :1], rows[:1].repeat(4, axis=0)):
        assert np.isfinite(tsne(few, seed=0)).all()


def test_umap_gets_seed_and_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class UMAP:
        def __init__(self, **options) -> None:
            seen.append(options)

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            return rows[:, :2] * 2

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    rows = cloud(9, 4)
    xy, axes = project(rows, "umap", seed=11)
    np.testing.assert_array_equal(xy, rows[:, :2].astype(np.float64) * 2)
    assert seen == [{"n_components": 2, "n_neighbors": 8, "random_state": 11}]
    assert axes == ("", "")


def test_axes_of_the_pca_say_how_much_they_show() -> None:
    xy, axes = project(np.array([[2.0, 0], [-2, 0], [0, 1], [0, -1]]), "pca", 0)
    np.testing.assert_allclose(np.abs(xy), [[2, 0], [2, 0], [0, 1], [0, 1]], atol=1e-12)
    assert axes == ("1st component, 80% of the variance", "2nd component, 20%")


@pytest.mark.parametrize(
    ("method", "package", "words"),
    [("pca", "matplotlib", r"lightning-nrml\[plot\]"), ("umap", "umap", "pip install umap-learn")],
)
def test_missing_packages_are_named(method, package, words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(ImportError, match=words):
        check_installed(method)
