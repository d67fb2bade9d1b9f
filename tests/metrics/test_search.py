"""topk_search against a full stable sort, on every internal path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_nrml.metrics import search
from lightning_nrml.metrics.search import topk_search


def rows(n, dim=6, seed=0, levels=0):
    """Random rows; with ``levels``, small integers, so that inner products are exact and tie a lot."""
    g = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(-levels, levels + 1, (n, dim), generator=g).float()
    return torch.randn(n, dim, generator=g)


def full_sort(query, gallery, k, exclude=None):
    scores = query @ gallery.T
    if exclude is not None:
        for row, column in enumerate(exclude.tolist()):
            if column >= 0:
                scores[row, column] = -torch.inf
    value, index = scores.sort(dim=1, descending=True, stable=True)
    return value[:, :k], index[:, :k].masked_fill(value[:, :k] == -torch.inf, -1)


# 1000 gallery rows: k = 1, 3, 10 go through blocks, 40, 400 and 999 through packed keys (float32, CPU)
@pytest.mark.parametrize("k", [1, 3, 10, 40, 400, 999, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_a_stable_sort_with_many_ties(k, dtype):
    gallery, query = rows(1000, levels=2).to(dtype), rows(37, seed=1, levels=2).to(dtype)
    exclude = torch.arange(37) * 20 - 1
    value, index = topk_search(query, gallery, k, exclude=exclude, similarity="dot", chunk=16)
    want_value, want_index = full_sort(query, gallery, k, exclude)
    assert torch.equal(value, want_value)
    assert torch.equal(index, want_index)
    assert value.dtype == dtype


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 255, 256, 257, 1001])
def test_sizes_around_the_block_edges(n):
    gallery = rows(n, levels=1)
    for k in (1, 2, n, n + 5):
        value, index = topk_search(gallery, gallery, k, exclude=torch.arange(n), similarity="dot")
        want_value, want_index = full_sort(gallery, gallery, min(k, n), torch.arange(n))
        assert torch.equal(value, want_value)
        assert torch.equal(index, want_index)


def test_blocks_are_used_and_exact_when_all_winners_share_one(monkeypatch):
    used = []
    original = search._top_of_blocks
    monkeypatch.setattr(search, "_top_of_blocks", lambda *a: used.append(a[2]) or original(*a))
    gallery = -torch.ones(4096, 1)
    block, k = search._block_size(4096, 9), 8
    comb = torch.arange(block) * (4096 // block) + 5  # the members of block 5
    gallery[comb[:8], 0] = torch.arange(8.0)
    value, index = topk_search(torch.ones(1, 1), gallery, k, similarity="dot")
    assert used == [block]
    assert block >= 8
    assert value[0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert torch.equal(index[0], comb[:8].flip(0))


@pytest.mark.parametrize("k", [2, 300])
def test_padding_never_wins_over_negative_similarities(k):
    gallery = rows(1003).abs()
    value, index = topk_search(-gallery[:9], gallery, k, similarity="dot")
    assert (value < 0).all()
    assert torch.equal(index, full_sort(-gallery[:9], gallery, k)[1])


def test_minus_zero_ties_with_zero():
    gallery = torch.tensor([[0.0], [1.0], [-0.0], [0.0], [-1.0]])
    query = torch.tensor([[-0.0], [1.0]])
    index = topk_search(query, gallery, 5, similarity="dot")[1]
    assert index.tolist() == [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4]]


@pytest.mark.parametrize("k", [5, 100])
def test_faiss_agrees(k):
    gallery, query, exclude = rows(500, seed=2), rows(60, seed=3).bfloat16(), torch.arange(60)
    value, index = topk_search(query, gallery, k, exclude=exclude)
    faiss_value, faiss_index = topk_search(query, gallery, k, exclude=exclude, backend="faiss")
    assert torch.equal(faiss_index, index)
    assert torch.allclose(faiss_value, value, atol=1e-6)
    assert (index != exclude[:, None]).all()
    cosine = (F.normalize(query.float()) @ F.normalize(gallery).T).gather(1, index)
    assert torch.allclose(value, cosine, atol=1e-6)


def test_faiss_fills_what_is_missing():
    gallery = rows(3)
    value, index = topk_search(gallery, gallery, 5, exclude=torch.arange(3), backend="faiss")
    assert index.shape == (3, 3)
    assert (index[:, 2] == -1).all()
    assert (value[:, 2] == -torch.inf).all()
    assert torch.equal(index, topk_search(gallery, gallery, 5, exclude=torch.arange(3))[1])


def test_user_precision_settings_do_not_round_the_scores(monkeypatch):
    gallery, query = rows(300, dim=64), rows(20, dim=64, seed=1)
    want = topk_search(query, gallery, 20)
    seen, product = [], torch.mm

    def spy(*args, **kwargs):  # few CPUs have the low-precision products that the setting allows
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = topk_search(query, gallery, 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee"]
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_errors():
    x = rows(10)
    with pytest.raises(ValueError, match="k must be at least 1"):
        topk_search(x, x, 0)
    with pytest.raises(ValueError, match="query has 5 dimensions but gallery has 6"):
        topk_search(x[:, :5], x, 1)
    with pytest.raises(ValueError, match="'cosine' or 'dot'"):
        topk_search(x, x, 1, similarity="l2")
    with pytest.raises(ValueError, match=r"exclude must have shape \(10,\)"):
        topk_search(x, x, 1, exclude=torch.arange(9))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        topk_search(x, x, 1, chunk=0)
    bad = x.clone()
    bad[7, 1] = -torch.inf
    with pytest.raises(ValueError, match=r"1 of 10 rows of gallery contain NaN .*\(first rows: 7\)"):
        topk_search(x, bad, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [3, 400])
def test_cuda_equals_cpu(k):
    gallery = rows(1000, levels=2)
    want = topk_search(gallery, gallery, k, exclude=torch.arange(1000), similarity="dot")
    got = topk_search(
        gallery.cuda(), gallery.cuda(), k, exclude=torch.arange(1000, device="cuda"), similarity="dot"
    )
    assert torch.equal(got[0].cpu(), want[0])
    assert torch.equal(got[1].cpu(), want[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_are_normalised_in_a_new_tensor_and_a_zero_row_stays_zero(dtype):
    x = torch.randn(7, 5).to(dtype)
    x[3] = 0
    before = x.clone()
    rows = search.prepare_rows(x)
    exact = x if dtype == torch.float64 else x.float()
    assert torch.equal(rows, F.normalize(exact, dim=1))
    assert rows.dtype == exact.dtype
    assert rows.T.is_contiguous()  # the layout that products with a gallery want
    rows.mul_(2)
    assert torch.equal(x, before)
    value, index = topk_search(x, x, 2, exclude=torch.arange(7))
    assert value[3].tolist() == [0, 0]
    assert index[3].tolist() == [0, 1]  # equally far from all: the first rows
