"""Parameter groups and the exact learning-rate curve."""

from __future__ import annotations

import math

import pytest
import torch
from timm import create_model
from torch import nn

from lightning_nrml.optim import LARS, OptimizerConfig, ScheduleConfig, create_optimizer, create_schedule


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def test_biases_and_norms_are_not_decayed_and_loss_has_its_own_rate() -> None:
    net, proxies = _net(), nn.Parameter(torch.zeros(5, 2))
    net.register_parameter("proxies", proxies)
    config = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.01, loss_lr=1.0)
    groups = create_optimizer(config, net, [proxies]).param_groups
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (2, 0.1, 0.01),
        (3, 0.1, 0.0),
        (1, 1.0, 0.0),
    ]


def test_a_loss_rate_of_zero_rests_the_loss_and_none_is_the_common_rate() -> None:
    proxies = nn.Parameter(torch.zeros(5, 2))
    for given, rate in ((0.0, 0.0), (None, 0.1)):
        groups = create_optimizer(OptimizerConfig(lr=0.1, loss_lr=given), _net(), [proxies]).param_groups
        assert groups[-1]["lr"] == rate


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_momentum_is_handed_on(name: str) -> None:
    groups = create_optimizer(OptimizerConfig(name, momentum=0.3), _net()).param_groups
    assert {g["momentum"] for g in groups} == {0.3}


def test_decay_all_and_frozen_parameters() -> None:
    net = _net()
    net[0].weight.requires_grad_(False)
    still = nn.Parameter(torch.zeros(5, 2), requires_grad=False)
    groups = create_optimizer(OptimizerConfig(decay_all=True, weight_decay=0.3), net, [still]).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(4, 0.3)]


@pytest.mark.parametrize("name", ["lr", "loss_lr", "weight_decay", "loss_weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_rates_that_cannot_train_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^optimizer\.{name} must be a number of at least 0, got {value}$"):
        OptimizerConfig(**{name: value})
    assert getattr(OptimizerConfig(**{name: 0.0}), name) == 0.0


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars", "lamb"])
def test_every_optimiser_descends(name: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(6, 1), torch.randn(64, 6)
    y = x @ torch.arange(6.0)[:, None]
    optimizer = create_optimizer(OptimizerConfig(name=name, lr=0.02), net)
    losses = []
    for _ in range(30):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def _curve(config: ScheduleConfig, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = create_schedule(config, optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_warm_up_then_cosine_to_zero() -> None:
    rates = _curve(ScheduleConfig(warmup_steps=4), 24)
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[14] == pytest.approx(1.0)  # half way through the 20 cosine steps
    expected = [1 + math.cos(math.pi * t / 20) for t in range(21)]
    assert rates[4:] == pytest.approx(expected, abs=1e-6)


def test_share_of_steps_constant_and_floor() -> None:
    assert _curve(ScheduleConfig("constant", 0.25), 8)[2:] == pytest.approx([2.0] * 7)
    assert _curve(ScheduleConfig("cosine", 0, min_lr_ratio=0.1), 10)[-1] == pytest.approx(0.2)
    assert _curve(ScheduleConfig("constant", 1), 8)[:2] == pytest.approx([1.0, 2.0])  # one step, not all


def test_warm_up_longer_than_the_run_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="only 10 optimiser steps"):
        create_schedule(ScheduleConfig(warmup_steps=10), optimizer, 10)
    with pytest.raises(ValueError, match="give 0 or more"):
        create_schedule(ScheduleConfig(warmup_steps=-1), optimizer, 10)


@pytest.mark.parametrize(("lr", "loss_lr"), [(1e-4, 1e-2), (1e-3, 1e-5)])
@pytest.mark.parametrize("warmup", [0, 10])
def test_every_group_falls_to_its_own_floor(lr: float, loss_lr: float, warmup: int) -> None:
    def run(*peaks: float) -> list[list[float]]:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
        optimizer = torch.optim.SGD(groups)
        schedule, rates = create_schedule(ScheduleConfig("cosine", warmup, 0.1), optimizer, 40), []
        for _ in range(40):
            optimizer.step()
            schedule.step()
            rates.append([g["lr"] for g in optimizer.param_groups])
        return rates

    both = run(lr, loss_lr)
    assert both[-1] == pytest.approx([0.1 * lr, 0.1 * loss_lr])
    assert both[warmup:] == sorted(both[warmup:], reverse=True)  # after the warm-up they only fall
    # neither group feels the other: bit for bit the curve of an optimiser of its own
    assert both == [[a, b] for (a,), (b,) in zip(run(lr), run(loss_lr), strict=True)]


def test_one_peak_has_torchs_curve_and_a_resumed_run_the_same_bit_for_bit() -> None:
    def make() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        return optimizer, create_schedule(ScheduleConfig("cosine", 5, 0.1), optimizer, 30)

    ours, schedule = make()
    whole, whole_schedule = make()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(other, 25, 0.3 * 0.1)
    start = torch.optim.lr_scheduler.LinearLR(other, 1 / 6, total_iters=5)
    torchs = torch.optim.lr_scheduler.SequentialLR(other, [start, cosine], [5])
    for step in range(30):
        rate = ours.param_groups[0]["lr"]
        assert rate == whole.param_groups[0]["lr"], step
        assert rate == pytest.approx(other.param_groups[0]["lr"], rel=1e-12)
        for part in (ours, schedule, whole, whole_schedule, other, torchs):
            part.step()
        if step in (2, 12):  # in the warm-up, and in the middle of the cosine
            saved = ours.state_dict(), schedule.state_dict()
            ours, schedule = make()
            ours.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
            assert schedule.get_last_lr() == [ours.param_groups[0]["lr"]]
    assert ours.param_groups[0]["lr"] == pytest.approx(0.03)


def test_a_run_that_is_made_longer_goes_on_where_a_run_of_that_length_would_be() -> None:
    """And ends at the floor: torch's cosine climbs back to the peak."""

    def make(steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.3, 0.02)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, create_schedule(ScheduleConfig("cosine", 4, 0.1), optimizer, steps)

    def run(part: tuple, steps: int) -> list[list[float]]:
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in part[0].param_groups])
            part[0].step()
            part[1].step()
        return rates

    short = make(20)
    run(short, 20)
    assert short[1].get_last_lr() == pytest.approx([0.03, 0.002])
    longer = make(50)
    longer[0].load_state_dict(short[0].state_dict())
    longer[1].load_state_dict(short[1].state_dict())
    assert run(longer, 30) == run(make(50), 50)[20:]
    assert longer[1].get_last_lr() == pytest.approx([0.03, 0.002])
    run(longer, 7)  # beyond the end it stays there
    assert longer[1].get_last_lr() == pytest.approx([0.03, 0.002])


def test_a_schedule_of_torch_that_was_saved_is_gone_on_with() -> None:
    """As earlier versions saved it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    start = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 6, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25)
    torchs = torch.optim.lr_scheduler.SequentialLR(optimizer, [start, cosine], [5])
    for _ in range(9):
        optimizer.step()
        torchs.step()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    ours = create_schedule(ScheduleConfig("cosine", 5), other, 30)
    other.load_state_dict(optimizer.state_dict())
    ours.load_state_dict(torchs.state_dict())
    assert ours.get_last_lr() == pytest.approx(torchs.get_last_lr())
    other.step()
    ours.step()
    optimizer.step()
    torchs.step()
    assert ours.get_last_lr() == pytest.approx(torchs.get_last_lr())


@pytest.mark.parametrize("name", ["lars", "LARS", "Lars"])
def test_lars_is_ours_however_it_is_spelled(name: str) -> None:
    assert type(create_optimizer(OptimizerConfig(name=name), nn.Linear(3, 3))) is LARS


def test_what_a_backbone_excepts_has_no_weight_decay() -> None:
    net = create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model = nn.ModuleDict({"backbone": net})
    for decay_all in (False, True):
        config = OptimizerConfig("lars", weight_decay=0.1, decay_all=decay_all)
        groups = create_optimizer(config, model).param_groups
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        adapted = {id(p) for group in groups if group["adapt"] for p in group["params"]}
        assert decayed == adapted
        for p in (net.cls_token, net.pos_embed, net.norm.bias):
            assert (id(p) in decayed) is decay_all
        assert id(net.head.weight) in decayed
