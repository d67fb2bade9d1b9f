"""retrieval_metrics and RetrievalMetrics against the formulas, a peer, and their invariances."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nrml.metrics import RetrievalMetrics, retrieval_metrics


def slow_metrics(embedding, label, ks, query=None, gallery=None, average="query"):
    """The formulas of the card, one query and one rank at a time, in float64."""
    x = F.normalize(embedding.double(), dim=1)
    query = range(len(x)) if query is None else query.tolist()
    gallery = list(range(len(x))) if gallery is None else gallery.tolist()
    rows, skipped = [], 0
    for q in query:
        others = [g for g in gallery if g != q]
        relevant = sum(int(label[g] == label[q]) for g in others)
        if not relevant:
            skipped += 1
            continue
        ranked = sorted(others, key=lambda g: -float(x[q] @ x[g]))
        rel = [int(label[g] == label[q]) for g in ranked]
        row = [float(any(rel[:k])) for k in ks]
        row.append(sum(rel[i] * sum(rel[: i + 1]) / (i + 1) for i in range(relevant)) / relevant)
        row.append(sum(rel[:relevant]) / relevant)
        rows.append((int(label[q]), row))
    names = [*(f"recall@{k}" for k in ks), "map@r", "r_precision"]
    groups = [[r for _, r in rows]]
    if average == "class":
        groups = [[r for c, r in rows if c == wanted] for wanted in {c for c, _ in rows}]
    means = [[sum(column) / len(g) for column in zip(*g, strict=True)] for g in groups]
    mean = [sum(column) / len(means) for column in zip(*means, strict=True)]
    return dict(zip(names, mean, strict=True)) | {"num_queries": len(rows), "num_skipped": skipped}


def clusters(n=120, classes=9, dim=8, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (n,), generator=g)
    centre = torch.randn(classes, dim, generator=g)
    return centre[label] + spread * torch.randn(n, dim, generator=g), label


def angles(*degrees: float) -> Tensor:
    a = torch.tensor(degrees) * math.pi / 180
    return torch.stack([a.cos(), a.sin()], dim=1)


def assert_same(got, want, tol=1e-6):
    assert set(got) == set(want)
    for name in want:
        assert got[name] == pytest.approx(want[name], abs=tol), name


def test_tiny_case_of_the_definition():
    # one query at 0 degrees; ranked gallery 1, 0, 1, 1 -> R = 3
    embedding, label = angles(0, 10, 20, 30, 40), torch.tensor([7, 7, 3, 7, 7])
    got = retrieval_metrics(embedding, label, ks=(1, 2), query=torch.tensor([0]))
    assert got["recall@1"] == 1
    assert got["r_precision"] == pytest.approx(2 / 3)
    assert got["map@r"] == pytest.approx(5 / 9)
    assert (got["num_queries"], got["num_skipped"]) == (1, 0)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("average", ["query", "class"])
def test_equals_the_slow_loop(backend, average):
    embedding, label = clusters()
    ks = (1, 2, 4, 8, 500)
    got = retrieval_metrics(embedding, label, ks, backend=backend, average=average, chunk=7)
    assert_same(got, slow_metrics(embedding, label, ks, average=average))


@pytest.mark.parametrize("average", ["query", "class"])
def test_query_and_gallery_overlap_and_lone_queries(average):
    embedding, label = clusters(seed=3)
    query, gallery = torch.arange(0, 70), torch.arange(119, 49, -1)  # overlap 50..69, reversed gallery
    label[5] = 100  # in no gallery
    label[60] = 101  # alone in the gallery: nothing but itself
    want = slow_metrics(embedding, label, (1, 3), query, gallery, average)
    assert want["num_skipped"] == 2
    assert_same(retrieval_metrics(embedding, label, (1, 3), query, gallery, average=average), want)
    query_mask = torch.arange(120) < 70
    gallery_mask = torch.arange(120) >= 50
    assert_same(retrieval_metrics(embedding, label, (1, 3), query_mask, gallery_mask, average=average), want)


def test_equals_the_peer():
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    embedding, label = clusters(n=400, classes=30, dim=16)
    peer = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
    )
    want = peer.get_accuracy(embedding, label)
    got = retrieval_metrics(embedding, label)
    assert got["recall@1"] == pytest.approx(want["precision_at_1"], abs=1e-6)
    assert got["r_precision"] == pytest.approx(want["r_precision"], abs=1e-6)
    assert got["map@r"] == pytest.approx(want["mean_average_precision_at_r"], abs=1e-6)


def test_few_large_classes_in_small_chunks():
    embedding, label = clusters(n=300, classes=2, spread=2.0)
    label[label == 1] = torch.where(torch.arange(int((label == 1).sum())) < 5, 1, 2)
    got = retrieval_metrics(embedding, label, chunk=11)
    assert_same(got, slow_metrics(embedding, label, (1, 2, 4, 8)))


def test_duplicates_stay_and_self_is_dropped_by_index():
    # row 1 is an exact copy of row 0 with another label: it is a wrong first neighbour, not "self"
    embedding, label = angles(0, 0, 5, 90), torch.tensor([0, 1, 0, 1])
    got = retrieval_metrics(embedding, label, ks=(1, 2), query=torch.tensor([0]))
    assert (got["recall@1"], got["recall@2"]) == (0, 1)


def test_ties_go_to_the_smaller_row():
    same = torch.ones(6, 4)
    label = torch.tensor([0, 1, 0, 1, 0, 1])
    # every ranking is 0..5 without self; even rows find row 0 or 2 ...
    want = slow_metrics(same, label, (1, 2))
    assert_same(retrieval_metrics(same, label, (1, 2)), want)
    assert_same(retrieval_metrics(same, label, (1, 2), chunk=1), want)


def test_lone_classes_are_skipped_and_empty_answers_are_nan():
    embedding, label = clusters(n=27, classes=5)
    label[:2] = torch.tensor([50, 51])
    got = retrieval_metrics(embedding, label)
    assert got["num_skipped"] == int((label.bincount() == 1).sum()) >= 2
    assert_same(got, slow_metrics(embedding, label, (1, 2, 4, 8)))
    alone = retrieval_metrics(embedding, torch.arange(27))
    assert math.isnan(alone["recall@1"])
    assert math.isnan(alone["map@r"])
    assert (alone["num_queries"], alone["num_skipped"]) == (0, 27)


def test_large_ids_do_not_merge():
    # 2**24 and 2**24 + 1 are the same float32
    embedding, label = angles(0, 1, 50, 51), torch.tensor([0, 1, 0, 1])
    small = retrieval_metrics(embedding, label)
    assert small["recall@1"] == 0
    assert_same(retrieval_metrics(embedding, label + 2**24), small)
    assert_same(retrieval_metrics(embedding, label - 2**40), small)
    metric = RetrievalMetrics()
    metric.update(embedding, label + 2**24)
    assert_same(metric.compute(), small)


def test_invariant_to_order_length_and_label_names():
    embedding, label = clusters(seed=5)
    want = retrieval_metrics(embedding, label)
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(len(label), generator=g)
    assert_same(retrieval_metrics(embedding[order], label[order]), want)
    length = torch.rand(len(label), 1, generator=g) + 0.1
    assert_same(retrieval_metrics(embedding * length, 1000 - 3 * label), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_ranked_in_full_precision(dtype):
    embedding, label = clusters(seed=6)
    embedding = embedding.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = retrieval_metrics(embedding, label)
    assert_same(got, slow_metrics(embedding, label, (1, 2, 4, 8)))


def test_leaves_its_input_and_the_graph_alone():
    embedding, label = clusters()
    before = embedding.clone()
    embedding.requires_grad_()
    retrieval_metrics(embedding, label)
    assert torch.equal(embedding.detach(), before)
    assert embedding.grad is None


def test_errors_name_what_is_wrong():
    embedding, label = clusters(n=20)
    with pytest.raises(ValueError, match=r"label \(N,\), got \(20, 8\) and \(19,\)"):
        retrieval_metrics(embedding, label[:-1])
    with pytest.raises(ValueError, match="integers"):
        retrieval_metrics(embedding, label.float())
    with pytest.raises(ValueError, match="average"):
        retrieval_metrics(embedding, label, average="macro")
    with pytest.raises(ValueError, match="backend"):
        retrieval_metrics(embedding, label, backend="numpy")
    with pytest.raises(ValueError, match="ks must be"):
        retrieval_metrics(embedding, label, ks=(0, 1))
    with pytest.raises(ValueError, match=r"gallery names rows outside 0..19"):
        retrieval_metrics(embedding, label, gallery=torch.tensor([3, 20]))
    with pytest.raises(ValueError, match="twice"):
        retrieval_metrics(embedding, label, gallery=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"mask query must have shape \(20,\)"):
        retrieval_metrics(embedding, label, query=torch.ones(3, dtype=torch.bool))
    embedding[4, 2], embedding[9, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"2 of 20 rows .*first rows: 4, 9"):
        retrieval_metrics(embedding, label)


class TestRetrievalMetrics:
    def test_batches_equal_the_function(self):
        embedding, label = clusters()
        metric = RetrievalMetrics(ks=(1, 8), average="class")
        for rows in torch.arange(120).split(33):
            metric.update(embedding[rows], label[rows])
        assert_same(metric.compute(), retrieval_metrics(embedding, label, (1, 8), average="class"))
        metric.reset()
        metric.update(embedding[:50].bfloat16(), label[:50])
        want = retrieval_metrics(embedding[:50].bfloat16(), label[:50], (1, 8), average="class")
        assert_same(metric.compute(), want)

    def test_padding_of_a_distributed_sampler_counts_once(self):
        embedding, label = clusters()
        index = torch.arange(120) + 7
        metric = RetrievalMetrics()
        metric.update(embedding, label, index)
        metric.update(embedding[:9], label[:9], index[:9])
        assert_same(metric.compute(), retrieval_metrics(embedding, label))
        metric.reset()
        metric.update(embedding, label)
        metric.update(embedding[:9], label[:9])  # without index: rows of their own
        assert metric.compute()["num_queries"] == 129

    def test_the_first_row_of_an_index_wins(self):
        metric = RetrievalMetrics()
        index = torch.tensor([3, 1, 3, 1, 0] * 20)
        metric.update(torch.arange(100.0)[:, None], torch.arange(100), index)
        embedding, label, kept = metric.rows()
        assert label.tolist() == embedding[:, 0].tolist() == [0, 1, 4]
        assert kept.tolist() == [3, 1, 0]

    def test_without_rows_is_nan(self):
        metric = RetrievalMetrics()
        metric._update_count = 1
        got = metric.compute()
        assert math.isnan(got["recall@1"])
        assert got["num_queries"] == 0

    def test_width_must_not_change(self):
        metric = RetrievalMetrics()
        metric.update(torch.randn(4, 3), torch.arange(4))
        with pytest.raises(ValueError, match="5 dimensions, earlier batches 3"):
            metric.update(torch.randn(4, 5), torch.arange(4))
