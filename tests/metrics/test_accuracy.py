"""Top-k accuracy: counted by hand, tied scores, missing labels."""

from __future__ import annotations

import pytest
import torch

from lightning_nrml.metrics import TopKAccuracy


def test_equals_sorting():
    g = torch.Generator().manual_seed(0)
    score, label = torch.randn(50, 8, generator=g), torch.randint(8, (50,), generator=g)
    metric = TopKAccuracy((1, 3, 5))
    for part in torch.arange(50).split(17):
        metric.update(score[part], label[part])
    order = score.argsort(dim=1, descending=True)
    for k in (1, 3, 5):
        want = sum(int(label[i]) in order[i, :k].tolist() for i in range(50)) / 50
        assert metric.compute()[f"top{k}"] == pytest.approx(want)


def test_ties_go_to_the_lower_class_and_minus_infinity_is_no_answer():
    metric = TopKAccuracy((1, 2))
    metric.update(torch.zeros(3, 3), torch.tensor([0, 1, 2]))
    assert metric.compute() == pytest.approx({"top1": 1 / 3, "top2": 2 / 3})
    metric.reset()
    metric.update(torch.zeros(1, 3), torch.tensor([0]))
    assert metric.compute() == {"top1": 1, "top2": 1}
    metric.reset()
    metric.update(torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.tensor([1]))
    assert metric.compute() == {"top1": 0, "top2": 0}


def test_k_that_every_answer_reaches_is_left_out_and_unknown_labels_are_not_counted():
    metric = TopKAccuracy((1, 5))
    metric.update(torch.eye(5)[:3], torch.tensor([0, -1, 1]))
    assert metric.compute() == {"top1": 0.5}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_rows():
    assert TopKAccuracy().compute() == {}
    metric = TopKAccuracy()
    metric.update(torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    assert metric.compute() == {}


def test_errors():
    with pytest.raises(ValueError, match="each 1 or more"):
        TopKAccuracy((0,))
    with pytest.raises(ValueError, match="label 3 is not one of the 3 scored classes"):
        TopKAccuracy().update(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3,\)"):
        TopKAccuracy().update(torch.zeros(2, 3), torch.tensor([1, 1, 1]))
