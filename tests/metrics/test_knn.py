"""KNNClassifier against a loop over neighbours."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_nrml.metrics import KNNClassifier


def draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    bank, label = torch.randn(90, 5, generator=g), torch.randint(4, (90,), generator=g) * 10 + 3
    return bank, label, torch.randn(25, 5, generator=g)


def slow_shares(bank, label, query, k, temperature, exclude=None):
    bank, query = F.normalize(bank.double()), F.normalize(query.double())
    classes = sorted(set(label.tolist()))
    shares = torch.zeros(len(query), len(classes), dtype=torch.float64)
    for row, q in enumerate(query):
        near = [(float(q @ b), i) for i, b in enumerate(bank) if exclude is None or exclude[row] != i]
        for similarity, i in sorted(near, reverse=True)[:k]:
            shares[row, classes.index(int(label[i]))] += math.exp(similarity / temperature)
    return shares / shares.sum(dim=1, keepdim=True), torch.tensor(classes)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.5), (200, 0.07)])
def test_votes_equal_the_loop(backend, k, temperature):
    bank, label, query = draw()
    knn = KNNClassifier(k, temperature, chunk=8, backend=backend).fit(bank, label)
    predicted, shares = knn.predict_scores(query)
    want, classes = slow_shares(bank, label, query, k, temperature)
    assert torch.equal(knn.classes, classes)
    assert torch.allclose(shares.double(), want, atol=1e-5)
    assert torch.equal(predicted, classes[want.argmax(dim=1)])
    assert torch.equal(knn.predict(query), predicted)


def test_leave_one_out_never_asks_itself():
    bank, label, _ = draw()
    knn = KNNClassifier(5, 0.1, chunk=8).fit(bank, label)
    itself = torch.arange(90)
    want, classes = slow_shares(bank, label, bank, 5, 0.1, itself)
    assert torch.equal(knn.predict(bank, exclude=itself), classes[want.argmax(dim=1)])
    assert not torch.equal(knn.predict(bank), knn.predict(bank, exclude=itself))


def test_small_temperature_is_the_nearest_neighbour_and_infinite_the_plain_vote():
    bank, label, query = draw()
    nearest = KNNClassifier(1).fit(bank, label).predict(query)
    assert torch.equal(KNNClassifier(50, 1e-6).fit(bank, label).predict(query), nearest)
    plain = KNNClassifier(9, float("inf")).fit(bank, label).predict_scores(query)[1]
    assert torch.allclose(plain * 9, (plain * 9).round(), atol=1e-5)


def test_equal_votes_go_to_the_smaller_class():
    bank = torch.eye(2)
    knn = KNNClassifier(2, float("inf")).fit(bank, torch.tensor([8, 4]))
    assert knn.predict(torch.tensor([[2.0, 1.0]])).tolist() == [4]


def test_a_query_without_voters_has_no_shares():
    knn = KNNClassifier(3).fit(torch.ones(1, 2), torch.tensor([6]))
    shares = knn.predict_scores(torch.ones(1, 2), exclude=torch.tensor([0]))[1]
    assert shares.tolist() == [[0.0]]


def test_half_precision_query_and_bank():
    bank, label, query = draw()
    want = KNNClassifier(5).fit(bank.bfloat16().float(), label).predict(query.bfloat16().float())
    assert torch.equal(KNNClassifier(5).fit(bank.bfloat16(), label).predict(query.bfloat16()), want)


def test_errors():
    bank, label, query = draw()
    with pytest.raises(RuntimeError, match="call fit"):
        KNNClassifier(3).predict(query)
    with pytest.raises(ValueError, match="k must be at least 1"):
        KNNClassifier(0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        KNNClassifier(1, 0.0)
    with pytest.raises(ValueError, match="N >= 1"):
        KNNClassifier(1).fit(bank[:0], label[:0])
    with pytest.raises(ValueError, match="query has 4 dimensions but the bank has 5"):
        KNNClassifier(1).fit(bank, label).predict(query[:, :4])
