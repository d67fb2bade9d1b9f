"""SupConLoss: closed forms of the card and a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.losses import SupConLoss


def slow(z: Tensor, label: Tensor, t: float, w: Tensor, drop: bool) -> Tensor:
    z = F.normalize(z.double(), dim=1)
    total, counted = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if label[p] == label[i]]
        mass = sum(float(w[p]) for p in positives)
        if mass == 0:
            counted += 0.0 if drop else float(w[i])
            continue
        log_sum = sum(w[a] * torch.exp(z[i] @ z[a] / t) for a in others).log()
        total = total + w[i] * sum(w[p] * (log_sum - z[i] @ z[p] / t) for p in positives) / mass
        counted += float(w[i])
    return total / counted


@pytest.mark.parametrize(("rule", "want"), [("zero", 5 / 6 * math.log(5)), ("drop", math.log(5))])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_collapsed_batch(rule, want, temperature):
    z = torch.ones(6, 3)
    label = torch.tensor([0, 0, 0, 1, 1, 2])
    assert SupConLoss(temperature, empty_positive=rule)(z, label).item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(("temperature", "want"), [(1.0, 0.551445), (0.1, 9.0796e-5)])
def test_orthogonal_classes(temperature, want):
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    got = SupConLoss(temperature)(z, torch.tensor([0, 0, 1, 1])).item()
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [None, [1.0, 0, 1, 1, 0, 1, 1, 0], [0.1, 0.9, 0, 0.3, 1, 0.2, 0.7, 0.5]])
@pytest.mark.parametrize("rule", ["zero", "drop"])
def test_equals_the_loop(dtype, weight, rule):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 5, generator=generator).to(dtype)
    label = torch.tensor([0, 0, 1, 1, 1, 2, 0, 3])
    w = None if weight is None else torch.tensor(weight)
    ones = torch.ones(8) if w is None else w
    fast, reference = z.clone().requires_grad_(), z.double().requires_grad_()
    got = SupConLoss(0.2, empty_positive=rule)(fast, label, w)
    want = slow(reference, label, 0.2, ones.double(), rule == "drop")
    got.backward()
    want.backward()
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


def test_scaling_all_weights_leaves_the_gradient():
    z, label = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    z.requires_grad_()
    (full,) = torch.autograd.grad(SupConLoss()(z, label), z)
    (quarter,) = torch.autograd.grad(SupConLoss()(z, label, torch.full((8,), 0.25)), z)
    torch.testing.assert_close(full, quarter)


def test_base_temperature_scales_the_loss():
    z, label = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    got = SupConLoss(0.1, base_temperature=0.07)(z, label)
    torch.testing.assert_close(got, SupConLoss(0.1)(z, label) / 0.7)


def test_rotation_of_the_embedding_space_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    z, label = torch.randn(8, 5, generator=generator).double(), torch.arange(8) % 3
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator).double())
    torch.testing.assert_close(SupConLoss()(z @ q, label), SupConLoss()(z, label))


def test_agrees_with_pytorch_metric_learning_where_the_rules_agree():
    from pytorch_metric_learning.losses import SupConLoss as Peer

    z, label = (
        torch.randn(12, 5, generator=torch.Generator().manual_seed(3)),
        torch.tensor([*range(5)] * 2 + [7, 8]),
    )
    torch.testing.assert_close(SupConLoss(0.1, empty_positive="drop")(z, label), Peer(0.1)(z, label))


def test_senseless_arguments_are_refused():
    with pytest.raises(ValueError, match="'temperature' must be positive, got 0"):
        SupConLoss(0)
    with pytest.raises(ValueError, match="'base_temperature'"):
        SupConLoss(0.1, -1.0)
    with pytest.raises(ValueError, match="'zero' or 'drop', got 'skip'"):
        SupConLoss(empty_positive="skip")
