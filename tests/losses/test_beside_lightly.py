"""Our self-supervised losses and the teacher's average are lightly's, on equal inputs in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrml.losses import BYOLLoss, MoCHiLoss, NTXentLoss, SwAVLoss, sinkhorn
from lightning_nrml.models import MomentumTeacher

pytest.importorskip("lightly", reason="the extra 'bench' is not installed")
from lightly.loss import NegativeCosineSimilarity, SwaVLoss
from lightly.loss import NTXentLoss as LightlyNTXent
from lightly.models.utils import update_momentum

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
    """Value and gradients."""
    torch.testing.assert_close(got, want, **TOLERANCE)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for one, two in pairs:
        assert two.abs().max() > 1e-6
        torch.testing.assert_close(one, two, **TOLERANCE)


@pytest.mark.parametrize("temperature", [0.5, 0.2, 0.07])
def test_simclr(temperature):
    a, b = rows(2, 33, 8).unbind()
    a, b = a.requires_grad_(), b.requires_grad_()
    assert_same(NTXentLoss(temperature)(a, b), LightlyNTXent(temperature)(a, b), a, b)


@pytest.mark.parametrize("temperature", [0.2, 0.07])
def test_moco(temperature):
    q, k, queue = rows(16, 8).requires_grad_(), rows(16, 8, seed=1), F.normalize(rows(48, 8, seed=2), dim=1)
    peer = LightlyNTXent(temperature, memory_bank_size=(48, 8)).double()
    peer.memory_bank.bank.copy_(queue)
    ours = MoCHiLoss(temperature, num_hard=0, num_mixed=0, num_query_mixed=0)
    assert_same(ours(q, k, queue), peer(q, k), q)


def test_byol_is_four_times_the_mean_of_the_cosines_plus_four():
    p_a, p_b = rows(16, 8).requires_grad_(), rows(16, 8, seed=1).requires_grad_()
    t_a, t_b = rows(2, 16, 8, seed=2).unbind()
    peer = NegativeCosineSimilarity()
    want = 4 + 4 * 0.5 * (peer(p_a, t_b) + peer(p_b, t_a))
    assert_same(BYOLLoss()(p_a, p_b, t_a, t_b), want, p_a, p_b)


@pytest.mark.parametrize("small", [0, 3])
@pytest.mark.parametrize("queued", [0, 24])
def test_swav(small, queued):
    scores = [torch.tanh(rows(16, 10, seed=i)).requires_grad_() for i in range(2 + small)]
    queue = [torch.tanh(rows(queued, 10, seed=9 + i)) for i in range(2)]
    codes = [sinkhorn(torch.cat([queue[i], scores[i].detach()]), 0.05, 3)[queued:] for i in range(2)]
    want = SwaVLoss(0.1, 3, 0.05)(scores[:2], scores[2:], queue if queued else None)
    assert_same(SwAVLoss(0.1)(scores, codes, [0, 1]), want.squeeze(), *scores)


def test_teacher():
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    ours = MomentumTeacher(student)
    peer = MomentumTeacher(student).module
    with torch.no_grad():
        for step in range(3):
            for p in student.parameters():
                p.add_(torch.ones_like(p) * (step + 1))
            ours.update(student, 0.9)
            update_momentum(student, peer, m=0.9)
    for one, two, now in zip(ours.parameters(), peer.parameters(), student.parameters(), strict=True):
        assert (one - now).abs().min() > 0.1
        torch.testing.assert_close(one, two, **TOLERANCE)
