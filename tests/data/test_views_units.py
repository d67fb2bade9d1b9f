"""Views of images that are not in [0, 1]: counts, decibels, standardised bands."""

from __future__ import annotations

import pytest
import torch

from lightning_nrml.data import views as V

KEY = V.ViewKey(seed=3, epoch=0, batch=1)
COUNTS = [400.0, 3000.0, -12.0, 2.0]  # two bands of counts, one of decibels, one small


def raster(rows: int = 16, side: int = 24, seed: int = 0, channels: int = 4) -> torch.Tensor:
    """Bands of very different level and sign that share a pattern."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.rand(rows, 1, side, side, generator=generator)
    own = torch.rand(rows, channels, side, side, generator=generator)
    level = torch.tensor(COUNTS[:channels]).view(1, -1, 1, 1)
    return level * (1 + 0.5 * shared + 0.3 * own)


def unit(rows: int = 16, side: int = 24, channels: int = 4) -> torch.Tensor:
    """Images in [0, 1] that reach both ends, so that a bicubic crop passes them."""
    x = torch.rand(rows, channels, side, side, generator=torch.Generator().manual_seed(5))
    return ((x - 0.5) * 3 + 0.5).clamp(0, 1)


RECIPES = {
    "simclr": lambda: V.SimCLRViews(16),
    "moco": lambda: V.MoCoViews(16),
    "byol": lambda: V.BYOLViews(16, solarize=(0.0, 0.5)),
    "multicrop": lambda: V.MultiCropViews(16, 2, 8, 2, blur_kernel=3),
    "metric": lambda: V.MetricView(16, brightness=0.2, contrast=0.2, shift=0.1, noise=0.02),
    "colour": lambda: V.MetricView(16, saturation=0.4, hue=0.1),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_no_view_flattens_bands_in_units_of_their_own(name: str, channels: int) -> None:
    x = raster(64, channels=channels)
    for view in RECIPES[name]()(x, KEY):
        spread = view.std((2, 3)) / x.std((2, 3)).mean(0)
        assert (
            spread.min() > 0.01
        )  # contrast down to .2 x .2 of SimCLR, blur and noise-like images leave that much
        assert spread.median() > 0.25


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("channels", [3, 4])
def test_views_of_bands_in_another_unit_are_the_same_views_in_that_unit(name: str, channels: int) -> None:
    x = raster(channels=channels)
    factor = torch.tensor([10.0, 0.5, 3.0, 100.0])[:channels].view(1, -1, 1, 1)
    for a, b in zip(RECIPES[name]()(x, KEY), RECIPES[name]()(factor * x, KEY), strict=True):
        torch.testing.assert_close(b / factor, a, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_unit_is_that_of_the_image_not_of_the_batch(name: str) -> None:
    counts, plain = raster(8), unit(8)
    mixed = torch.stack([counts, plain], 1).flatten(0, 1)
    make = RECIPES[name]()
    want_counts = make(torch.stack([counts, counts], 1).flatten(0, 1), KEY)
    want_plain = make(torch.stack([plain, plain], 1).flatten(0, 1), KEY)
    for got, a, b in zip(make(mixed, KEY), want_counts, want_plain, strict=True):
        torch.testing.assert_close(got[0::2], a[0::2], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got[1::2], b[1::2], rtol=1e-5, atol=1e-6)
    halves = zip(make(mixed[:5], KEY), make(mixed[5:], KEY.shift(5)), strict=True)
    for got, (a, b) in zip(make(mixed, KEY), halves, strict=True):
        torch.testing.assert_close(got, torch.cat([a, b]), rtol=1e-5, atol=1e-3)


def test_values_below_zero_alone_tell_another_unit() -> None:
    x = raster()[:, 2:3]  # decibels
    (view,) = V.MetricView(16, crop_scale=None, brightness=0.1)(x, KEY)
    assert view.max() < -8


def test_the_unit_of_an_image_is_known_in_every_part_of_the_batch(monkeypatch) -> None:
    x = torch.cat([unit(4), raster(4)])
    make = RECIPES["metric"]()
    (want,) = make(x, KEY)
    monkeypatch.setattr(V.base, "_CPU_PIXELS", 3 * 24 * 24)
    torch.testing.assert_close(make(x, KEY)[0], want)


def test_images_in_the_unit_range_are_clipped_although_the_bicubic_crop_passes_it() -> None:
    x = unit()
    (crop,) = V.Views([[V.RandomResizedCrop(12, (0.5, 1.0), interpolation="bicubic")]])(x, KEY)
    assert crop.max() > 1.02
    for op in (V.ColorJitter(0.01, p=1.0), V.BandJitter(brightness=0.01)):
        crops = V.RandomResizedCrop(12, (0.5, 1.0), interpolation="bicubic")
        (view,) = V.Views([[crops, op]])(x, KEY)
        assert view.min() == 0
        assert view.max() == 1


def test_colour_jitter_of_bands_follows_its_formula_without_a_clip() -> None:
    x = raster(3)
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
    factor = torch.tensor([[1.2, 0.7, 0.4], [0.8, 1.3, 1.5], [1.1, 0.5, 0.9]])
    gain = torch.linspace(-0.1, 0.1, 12).view(3, 4)
    got = V.ColorJitter(0.5, 0.5, 0.5, 0.1).jitter(x, order, factor, gain, own_units=True)
    for i in range(3):
        want = x[i].double()
        for kind in order[i].tolist():
            mean, spread = want.mean((1, 2), keepdim=True), want.std((1, 2), correction=0, keepdim=True)
            grey = ((want - mean) / spread).mean(0) * spread + mean
            if kind == 3:
                want = want * (1 + gain[i, :, None, None])
            else:
                target = (torch.zeros(()), mean, grey)[kind]
                want = factor[i, kind] * want + (1 - factor[i, kind]) * target
        torch.testing.assert_close(got[i].double(), want, rtol=1e-4, atol=1e-4)


def test_operations_alone_look_at_the_image_themselves() -> None:
    x, draws = raster(), lambda: V.Draws(KEY, 16, 0)
    for op in (V.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0), V.BandJitter(0.2, 0.2, 0.1, 0.02)):
        assert op(x, draws()).std((2, 3)).min() > 0.05
    grey = V.Grayscale(1.0)(x, draws())
    torch.testing.assert_close(grey.mean((2, 3)), x.mean((2, 3)), rtol=1e-4, atol=0)
    solarised = V.Solarize(0.5, 1.0)(x, draws())
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    torch.testing.assert_close(solarised, torch.where(x >= (low + high) / 2, low + high - x, x))


def test_shift_and_noise_are_shares_of_each_bands_level() -> None:
    x = torch.tensor(COUNTS).view(1, 4, 1, 1).expand(8, 4, 40, 40).contiguous()
    level = x.abs()[0, :, 0, 0]
    moved = (V.BandJitter(shift=0.1)(x, V.Draws(KEY, 8, 0)) - x)[:, :, 0, 0] / level
    torch.testing.assert_close(moved, moved[:, :1].expand(-1, 4), rtol=1e-3, atol=1e-5)
    assert 0.02 < moved.abs().max() <= 0.1
    noise = (V.BandJitter(noise=0.05)(x, V.Draws(KEY, 8, 0)) - x).std((0, 2, 3)) / level
    torch.testing.assert_close(noise, torch.full((4,), 0.05), rtol=0.05, atol=0)
    # without clip the values are taken as they are, in whatever unit
    plain = (V.BandJitter(shift=0.1, clip=False)(x, V.Draws(KEY, 8, 0)) - x)[:, :, 0, 0]
    assert plain.abs().max() < 0.11


def test_a_constant_band_stays_constant_and_finite() -> None:
    x = raster()
    x[:, 1] = 4000.3
    x[:, 2] = 0.0
    for name in RECIPES:
        view = RECIPES[name]()(x, KEY)[0]
        assert view.isfinite().all()
    jittered = V.ColorJitter(0.0, 0.4, 0.4, 0.0, p=1.0)(x, V.Draws(KEY, 16, 0))
    torch.testing.assert_close(jittered[:, 1], x[:, 1], rtol=1e-4, atol=0)
    assert not jittered[:, 2].any()
