"""LARS against its formulas, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_nrml.optim import LARS, OptimizerConfig, create_optimizer

VARIANTS = [
    {"trust": "joint"},
    {"trust": "joint", "lr_in_momentum": True},
    {"trust": "separate", "trust_coefficient": 0.02},
    {"trust": "separate", "trust_coefficient": 0.02, "clip": True},
]


def _by_hand(w: Tensor, grads: list[Tensor], rates: list[float], decay: float, **kw) -> Tensor:
    """The update of one layer, written from the docstring's formulas."""
    eta, buffer = kw.get("trust_coefficient", 1e-3), torch.zeros_like(w)
    for g, lr in zip(grads, rates, strict=True):
        u = g + decay * w
        size = u.norm() if kw["trust"] == "joint" else g.norm() + decay * w.norm()
        t = eta * w.norm() / size
        if kw.get("clip"):
            t = min(t / lr, 1)
        if kw.get("lr_in_momentum"):
            buffer = 0.9 * buffer + lr * t * u
            w = w - buffer
        else:
            buffer = 0.9 * buffer + t * u
            w = w - lr * buffer
    return w


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kw", VARIANTS)
def test_steps_equal_the_formula(kw: dict, decay: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 3).double()
    grads = [torch.randn(4, 3).double() * 10 ** (1 - i) for i in range(4)]
    rates = [0.5, 1.0, 0.3, 2.0]
    p = nn.Parameter(start.clone())
    optimizer = LARS([p], lr=1.0, weight_decay=decay, **kw)
    for g, lr in zip(grads, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
    torch.testing.assert_close(p.detach(), _by_hand(start, grads, rates, decay, **kw), rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.0, 1e-4])
def test_biases_and_norms_take_plain_steps_at_any_weight_decay(decay: float) -> None:
    """And weights are adapted at any: timm's LARS is plain SGD at weight decay 0."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = create_optimizer(OptimizerConfig("lars", 0.5, decay, momentum=0.0), net)
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {k: before[k] - p.detach() for k, p in net.named_parameters()}
    for name in ("0.bias", "1.weight", "1.bias"):
        torch.testing.assert_close(moved[name], torch.full((moved[name].numel(),), 0.5))
    assert float(moved["0.weight"].norm()) == pytest.approx(
        0.5e-3 * float(before["0.weight"].norm()), rel=1e-4
    )


def test_the_losss_own_parameters_keep_their_rate() -> None:
    """As SimCLR's supervised head: a rate of its own means what it says."""
    proxies = nn.Parameter(torch.zeros(5, 2))
    config = OptimizerConfig("lars", 0.6, loss_lr=0.1)
    groups = create_optimizer(config, nn.Linear(3, 4), [proxies]).param_groups
    assert [(g["lr"], g["adapt"]) for g in groups] == [(0.6, True), (0.6, False), (0.1, False)]


def test_decay_all_adapts_everything() -> None:
    """SwAV's LARC sees biases and norms too."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    config = OptimizerConfig("lars", 0.6, 1e-6, decay_all=True, kwargs={"trust": "separate"})
    groups = create_optimizer(config, net).param_groups
    assert [(len(g["params"]), g["adapt"], g["weight_decay"], g["trust"]) for g in groups] == [
        (4, True, 1e-6, "separate")
    ]


def test_zero_weights_and_missing_gradients() -> None:
    zero, absent = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([zero, absent], lr=0.1, weight_decay=0.1)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))
    assert torch.equal(absent.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(("trust", "step"), [("joint", 1e-3), ("separate", 0.1)])
@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_of_zeros_leaves_the_weight_decay_alone_at_work(trust, step, clip) -> None:
    """Joint: u = decay w, so t u = eta w; separate: t = 1, so t u = decay w. Nothing without a decay."""
    for decay, shrink in ((0.0, 1.0), (0.1, 1 - step)):
        p = nn.Parameter(torch.tensor([3.0, 4.0]))
        p.grad = torch.zeros(2)
        LARS([p], lr=1.0, weight_decay=decay, trust=trust, clip=clip).step()
        torch.testing.assert_close(p.detach(), shrink * torch.tensor([3.0, 4.0]))


def test_clipped_trust_at_a_rate_of_zero_is_one() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 5.0)
    optimizer = LARS([p], lr=0.0, clip=True)
    optimizer.step()
    assert p.tolist() == [1, 1]
    assert optimizer.state[p]["momentum_buffer"].tolist() == [5, 5]


def test_a_closure_is_run_and_its_loss_returned() -> None:
    p = nn.Parameter(torch.ones(1))

    def closure() -> float:
        loss = (2 * p).sum()
        loss.backward()
        return float(loss.detach())

    optimizer = LARS([p], lr=0.1, momentum=0.0, adapt=False)
    assert optimizer.step(closure) == 2.0
    assert p.item() == pytest.approx(0.8)
    assert optimizer.step() is None


def test_bad_settings_are_refused() -> None:
    p = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="trust must be 'joint' or 'separate', got 'both'"):
        LARS(p, 0.1, trust="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\)"):
        LARS(p, 0.1, momentum=1.0)
