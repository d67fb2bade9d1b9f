"""What the arguments of the ready-made views do to an image."""

from __future__ import annotations

import pytest
import torch

from lightning_nrml.data import views as V
from lightning_nrml.data.views import EACViews, InsCLRViews, MetricView

KEY = V.ViewKey(seed=3, epoch=0, batch=1)
ROWS = 64


def pictures(channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(ROWS, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_insclr_mines_on_the_plain_image_in_a_size_of_its_own() -> None:
    x = pictures(side=24)
    learned, plain = InsCLRViews(12, plain_size=24)(x, KEY)
    assert learned.shape[-2:] == (12, 12)
    assert torch.equal(plain, x)
    _, same = InsCLRViews(12)(x, KEY)
    assert same.shape[-2:] == (12, 12)


def test_eac_compares_the_image_with_its_mirror_image() -> None:
    x = pictures()
    plain, mirrored = EACViews(16, erasing=0.0, noise=0.0)(x, KEY)
    assert torch.equal(plain, x)
    assert torch.equal(mirrored, x.flip(-1))


def test_eac_puts_noise_on_half_of_the_first_views_only() -> None:
    x = pictures() * 0.6 + 0.2  # so that nothing is cut off
    plain, mirrored = EACViews(16, erasing=0.0, noise=0.02)(x, KEY)
    assert torch.equal(mirrored, x.flip(-1))
    noise = plain - x
    noisy = noise.abs().amax(dim=(1, 2, 3)) > 0
    assert 0.3 < noisy.float().mean() < 0.7
    assert noise[noisy].std() == pytest.approx(0.02, rel=0.05)


def test_eac_erases_each_view_by_itself_and_leaves_the_average() -> None:
    x = torch.ones(ROWS, 3, 16, 16)
    both = EACViews(16, erasing=1.0, noise=0.0)(x, KEY)
    gone = [(view != 1).any(dim=1) for view in both]
    for view, box in zip(both, gone, strict=True):
        assert (view[box.unsqueeze(1).expand_as(view)] == 0).all()
        share = box.float().mean(dim=(1, 2))
        assert 0.01 < share.min() <= share.max() < 0.3
    assert not torch.equal(*gone)
    some = EACViews(16, erasing=0.25, noise=0.0)(x, KEY)
    assert all(0.1 < (view != 1).any(dim=3).any(dim=2).any(dim=1).float().mean() < 0.45 for view in some)
    mean, std = (0.2, 0.4, 0.6), (0.5, 0.5, 0.5)
    (view, _), box = EACViews(16, erasing=1.0, noise=0.0, mean=mean, std=std)(x, KEY), gone[0]
    filled = view.permute(0, 2, 3, 1)[box]
    assert torch.allclose(filled, (0.4 - torch.tensor(mean)) / 0.5)


def test_metric_view_shifts_by_up_to_its_share_and_fills_what_comes_in() -> None:
    x = torch.ones(ROWS, 1, 20, 20)
    (view,) = MetricView(20, crop_scale=None, flip=0.0, translate=0.25, fill=0.5)(x, KEY)
    came_in = (view < 0.999).float().mean(dim=(1, 2, 3))
    assert view.min() == pytest.approx(0.5)
    assert 0.25 < came_in.max() <= 1 - 0.75**2 + 0.1
    (still,) = MetricView(20, crop_scale=None, flip=0.0, fill=0.5)(x, KEY)
    assert torch.equal(still, x)


def test_metric_view_jitters_every_image() -> None:
    x = pictures()
    for made in (
        MetricView(16, crop_scale=None, flip=0.0, saturation=0.5, hue=0.2),
        MetricView(16, crop_scale=None, flip=0.0, brightness=0.3),
    ):
        (view,) = made(x, KEY)
        assert ((view - x).abs().amax(dim=(1, 2, 3)) > 1e-4).float().mean() > 0.95


@pytest.mark.parametrize("per_band", [False, True])
def test_metric_view_draws_for_the_image_or_for_each_band(per_band: bool) -> None:
    x = torch.full((ROWS, 4, 8, 8), 0.5)
    (view,) = MetricView(8, crop_scale=None, flip=0.0, shift=0.2, per_band=per_band)(x, KEY)
    spread = (view.amax(dim=1) - view.amin(dim=1)).amax(dim=(1, 2))
    assert (spread > 0.01).float().mean() > 0.9 if per_band else spread.max() < 1e-6
    assert (view - 0.5).abs().max() <= 0.2 + 1e-6


@pytest.mark.parametrize(("name", "axis"), [("flip", -1), ("vertical_flip", -2)])
def test_metric_view_flips_along_its_axis_with_its_probability(name: str, axis: int) -> None:
    x = pictures()
    (view,) = MetricView(16, crop_scale=None, **{"flip": 0.0, name: 0.25})(x, KEY)
    turned = (view == x.flip(axis)).flatten(1).all(dim=1)
    assert ((view == x).flatten(1).all(dim=1) | turned).all()
    assert 0.1 < turned.float().mean() < 0.45
