"""The rules that every loss on (embedding, label, weight) keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_nrml.losses import ContrastiveLoss, CosineSoftmaxLoss, Loss, MarginLoss, PMLLoss, SupConLoss

N, DIM, CLASSES = 12, 8, 4
PML = {
    "pml-multi-similarity": ("MultiSimilarityLoss", {}),
    "pml-mined-triplet": ("TripletMarginLoss", {"miner": "MultiSimilarityMiner"}),
    "pml-contrastive": (
        "ContrastiveLoss",
        {"distance": "CosineSimilarity", "pos_margin": 1, "neg_margin": 0},
    ),
    "pml-margin": ("MarginLoss", {"learn_beta": True}),
    "pml-nca": ("NCALoss", {}),
    "pml-arcface": ("ArcFaceLoss", {}),
    "pml-softmax": ("NormalizedSoftmaxLoss", {}),
    "pml-soft-triple": ("SoftTripleLoss", {}),
    "pml-proxy-anchor": ("ProxyAnchorLoss", {}),
}
NAMES = ["contrastive", "supcon", "supcon-drop", "softmax", "margin", *PML]


def make(name: str) -> Loss:
    torch.manual_seed(3)
    if name in PML:
        pml, arguments = PML[name]
        return PMLLoss(pml, num_classes=CLASSES, embedding_size=DIM, **arguments)
    return {
        "contrastive": lambda: ContrastiveLoss(0.0),
        "supcon": SupConLoss,
        "supcon-drop": lambda: SupConLoss(empty_positive="drop"),
        "softmax": lambda: CosineSoftmaxLoss(CLASSES, DIM),
        "margin": lambda: MarginLoss(num_classes=CLASSES),
    }[name]()


def batch(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=generator), torch.arange(n) % CLASSES


def run(loss: nn.Module, z: Tensor, *args: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of (embedding, parameters); a loss that draws draws the same each time."""
    torch.manual_seed(9)
    z = z.detach().clone().requires_grad_()
    loss.zero_grad()
    value = loss(z, *args)
    value.backward()
    return value.detach(), [z.grad, *(p.grad for p in loss.parameters())]


@pytest.mark.parametrize("name", NAMES)
def test_all_dropped_is_an_exact_zero_with_zero_gradients(name):
    loss = make(name)
    z, label = batch()
    value, gradients = run(loss, z, label, torch.zeros(N))
    assert value.item() == 0
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_empty_batch_is_an_exact_zero(name, weighted):
    z, label = batch(0)
    value, gradients = run(make(name), z, label, torch.ones(0) if weighted else None)
    assert value.item() == 0
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3])
def test_lone_classes_are_finite(name, rows):
    z, _ = batch(rows)
    for weight in (None, torch.linspace(0, 1, rows) if "proxy" not in name else None):
        value, gradients = run(make(name), z, torch.arange(rows), weight)
        assert value.isfinite()
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_dropped_rows_change_nothing_even_if_they_hold_nan_and_unknown_labels(name):
    loss = make(name)
    z, label = batch()
    w = torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1])
    kept = w > 0
    want, want_gradients = run(loss, z[kept], label[kept])
    z[1], z[6], label[6] = math.nan, math.inf, -1
    got, gradients = run(loss, z, label, w)
    torch.testing.assert_close(got, want)
    assert (gradients[0][~kept] == 0).all()
    torch.testing.assert_close(gradients[0][kept], want_gradients[0])
    torch.testing.assert_close(gradients[1:], want_gradients[1:])
    assert want_gradients[0].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_constants_and_nan_or_below_zero_is_dropped(name):
    loss = make(name)
    z, label = batch()
    drop = torch.ones(N)
    drop[[1, 4]] = 0
    odd = drop.clone()
    odd[1], odd[4] = math.nan, -1.0
    for want, got in zip(run(loss, z, label, drop), run(loss, z, label, odd), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    weight = drop.requires_grad_()
    run(loss, z, label, weight)
    assert weight.grad is None


@pytest.mark.parametrize("name", ["supcon", "supcon-drop", "softmax", "margin"])  # pairs count w_i w_j
def test_the_gradient_depends_on_shares_of_weight_only_however_small(name):
    loss = make(name)
    z, label = batch()
    w = torch.linspace(0.1, 1, N)
    torch.testing.assert_close(run(loss, z, label, 1e-9 * w)[1], run(loss, z, label, w)[1])


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_bit_equal_to_weight_one(name):
    loss = make(name)
    z, label = batch()
    plain, plain_gradients = run(loss, z, label)
    ones, gradients = run(loss, z, label, torch.ones(N))
    assert torch.equal(plain, ones)
    assert all(torch.equal(a, b) for a, b in zip(plain_gradients, gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_autocast_give_the_fp32_loss(name):
    loss = make(name)
    z, label = batch()
    z = z.bfloat16()
    want, _ = run(loss, z.float(), label)
    types = [p.dtype for p in loss.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, gradients = run(loss, z, label)
    assert got.dtype is torch.float32
    assert torch.equal(got, want)
    assert gradients[0].dtype is torch.bfloat16
    assert [p.dtype for p in loss.parameters()] == types


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_keep_their_type_whatever_the_embedding(name, dtype):
    loss = make(name).to(dtype)
    z, label = batch()
    value, gradients = run(loss, z, label)
    assert value.dtype is not torch.bfloat16
    assert value.isfinite()
    for p, g in zip(loss.parameters(), gradients[1:], strict=True):
        assert p.dtype is g.dtype is dtype


@pytest.mark.parametrize("name", [n for n in NAMES if n != "margin"])  # draws by position
def test_order_of_the_batch_does_not_matter(name):
    loss = make(name)
    z, label = batch()
    w = None if "proxy" in name else torch.linspace(0, 1, N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    want, _ = run(loss, z, label, w)
    got, _ = run(loss, z[order], label[order], None if w is None else w[order])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name):
    loss = make(name)
    z, label = batch()
    with pytest.raises(ValueError, match=r"'label' must have shape \(12,\).*\(3,\)"):
        loss(z, label[:3])
    with pytest.raises(ValueError, match=r"'weight' must have shape \(12,\).*\(12, 2\)"):
        loss(z, label, torch.ones(12, 2))
    with pytest.raises(ValueError, match=r"'embedding' must be \(B, D\)"):
        loss(z[0], label)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_the_loss_lowers_it(name):
    loss = make(name)
    z, label = batch()
    before, gradients = run(loss, z, label)
    after, _ = run(loss, z - 1e-3 * gradients[0] / gradients[0].norm(), label)
    assert after < before


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_row_of_zeros_gets_no_gradient_and_spoils_nobody_elses(name):
    z, label = batch()
    z[0] = 0
    value, (gradient, *others) = run(make(name), z, label)
    assert value.isfinite()
    assert (gradient[0] == 0).all()
    assert all(g.isfinite().all() and g.abs().max() < 100 for g in (gradient, *others) if g is not None)
