"""Momentum teacher, its schedule, projectors and the small-image stem."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nrml.models import MomentumTeacher, cosine_tau, create_backbone, projector


@pytest.mark.parametrize(
    ("step", "tau"),
    [(0, 0.996), (250, 0.99658579), (500, 0.998), (750, 0.99941421), (1000, 1.0), (2000, 1.0)],
)
def test_cosine_tau(step: int, tau: float) -> None:
    assert cosine_tau(step, 1000, 0.996) == pytest.approx(tau, abs=5e-9)
    if step == 0:
        assert cosine_tau(0, 1000, 0.996) == 0.996


def test_cosine_tau_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        cosine_tau(0, 10, 1.5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cosine_tau(0, 0, 0.9)


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_average_of_parameters_equals_the_formula() -> None:
    torch.manual_seed(0)
    student = _net()
    teacher = MomentumTeacher(student)
    expected = [p.detach().clone() for p in student.parameters()]
    for step in range(5):
        for p in student.parameters():
            p.data += torch.randn_like(p)
        tau = 0.5 + 0.1 * step
        teacher.update(student, tau)
        expected = [
            tau * e + (1 - tau) * p.detach() for e, p in zip(expected, student.parameters(), strict=True)
        ]
    for mine, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.detach(), e, rtol=0, atol=1e-14)


def test_ends_of_the_range_are_exact() -> None:
    student = _net().float()
    teacher = MomentumTeacher(student)
    before = [p.clone() for p in teacher.parameters()]
    for p in student.parameters():
        p.data += torch.randn_like(p) * 1e3
    teacher.update(student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    teacher.update(student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_teacher_keeps_its_own_batch_statistics_and_has_no_gradient() -> None:
    student, x = _net(), torch.randn(8, 3).double() + 5
    teacher = MomentumTeacher(student)
    student(x)
    moved = student[1].running_mean.clone()
    teacher.update(student, 0.0)
    assert not teacher.module[1].running_mean.any()
    out = teacher(x.requires_grad_())
    torch.testing.assert_close(teacher.module[1].running_mean, moved)
    assert not out.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    teacher.module[1].running_mean.zero_()
    teacher.reset(student)
    assert torch.equal(teacher.module[1].running_mean, moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_teacher_of_a_student_in_half_precision_moves_in_float32(dtype: torch.dtype, cast: str) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.student = _net().float()
    if cast == "before":
        model.student.to(dtype)
    model.teacher = MomentumTeacher(model.student)
    before = [p.double().clone() for p in model.teacher.parameters()]
    model.to(dtype)
    assert all(x.dtype is torch.float32 for x in model.teacher.state_dict().values() if x.is_floating_point())
    for mine, start in zip(model.teacher.parameters(), before, strict=True):
        assert torch.equal(mine.double(), start)  # not rounded on the way
    for p in model.student.parameters():
        p.data.mul_(1.25)
    for _ in range(500):
        model.teacher.update(model.student, 0.996)
    for mine, start, target in zip(
        model.teacher.parameters(), before, model.student.parameters(), strict=True
    ):
        want = target.double() + 0.996**500 * (start - target.double())
        torch.testing.assert_close(mine.double(), want.detach(), rtol=1e-4, atol=1e-5)
    x = torch.randn(8, 3)
    out = model.teacher(x.to(dtype))
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), model.teacher(x), rtol=0.05, atol=0.1)
    assert MomentumTeacher(_net().float()).double().module[0].weight.dtype is torch.float64
    copied = MomentumTeacher(model.student)
    copied.load_state_dict(model.teacher.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(copied.parameters(), model.teacher.parameters(), strict=True)
    )


def test_teacher_refuses_another_net_and_another_range() -> None:
    teacher = MomentumTeacher(_net())
    with pytest.raises(ValueError, match="do not match"):
        teacher.update(nn.Linear(3, 4), 0.9)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got -0.1"):
        teacher.update(_net(), -0.1)


def _layout(net: nn.Sequential) -> list[str]:
    names = []
    for part in net:
        name = type(part).__name__
        if isinstance(part, nn.Linear):
            name += f" {part.in_features}-{part.out_features}" + ("" if part.bias is None else " bias")
        elif isinstance(part, nn.BatchNorm1d) and not part.bias.requires_grad:
            name += " no offset"
        names.append(name)
    return names


def test_projectors_are_those_of_the_papers() -> None:
    assert _layout(projector("simclr", 8, None, 4)) == [
        "Linear 8-8", "BatchNorm1d", "ReLU", "Linear 8-8", "BatchNorm1d", "ReLU",
        "Linear 8-4", "BatchNorm1d no offset",
    ]  # fmt: skip
    assert _layout(projector("moco", 8, 6, 4)) == ["Linear 8-6 bias", "ReLU", "Linear 6-4 bias"]
    assert _layout(projector("byol", 8, 6, 4)) == ["Linear 8-6 bias", "BatchNorm1d", "ReLU", "Linear 6-4"]
    assert _layout(projector("swav", 8, 6, 4)) == [
        "Linear 8-6 bias",
        "BatchNorm1d",
        "ReLU",
        "Linear 6-4 bias",
    ]
    assert _layout(projector("moco", 8, 6, 4, layers=1)) == ["Linear 8-4 bias"]
    with pytest.raises(ValueError, match="choose one of simclr, moco"):
        projector("dino", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        projector("moco", 8, layers=0)


def test_cifar_stem_keeps_the_resolution() -> None:
    net, features = create_backbone("resnet18", 3, stem="cifar")
    assert net.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, features, 4, 4)
    plain, _ = create_backbone("resnet18", 3)
    assert plain.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape[-1] == 1


@pytest.mark.parametrize("name", ["resnet50d", "vit_tiny_patch16_224", "conv4"])
def test_cifar_stem_is_for_plain_resnets(name: str) -> None:
    with pytest.raises(ValueError, match=f"not for '{name}'"):
        create_backbone(name, stem="cifar")
