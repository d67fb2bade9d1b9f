"""Views: counter-based draws, operations against torchvision, recipes, configuration files."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision.transforms.functional as TF
from torch.nn import functional as F

from lightning_nrml.data import views as V
from lightning_nrml.data.views.color import blur, shift_hue
from lightning_nrml.data.views.geometry import resize_boxes, resize_boxes_by_matrix

KEY = V.ViewKey(seed=7, epoch=2, batch=3)


class FixedDraws(V.Draws):
    """Hands out given numbers, the same for every row."""

    def __init__(self, rows: int, *numbers: float) -> None:
        super().__init__(KEY, rows, 0)
        self.numbers = list(numbers)

    def uniform(self, n, device=None):
        taken, self.numbers = self.numbers[:n], self.numbers[n:]
        return torch.tensor(taken).expand(self.rows, n).clone()


def image(rows=6, channels=3, height=40, width=32, seed=0, dtype=torch.uint8):
    """Smooth random images plus noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(rows, channels, 5, 4, generator=generator)
    fine = torch.rand(rows, channels, height, width, generator=generator)
    x = 0.7 * F.interpolate(coarse, (height, width), mode="bilinear") + 0.3 * fine
    return (x * 255).round().to(torch.uint8) if dtype is torch.uint8 else x.to(dtype)


# --- random numbers


def slow_uniform(key, row, stream, column):
    """The hash written with Python's unbounded integers."""
    mask = (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden, state = 0x9E3779B97F4A7C15, 0
    for part in (key.seed, key.epoch, key.batch, stream):
        state = mix((state + (part & mask) * golden + golden) & mask)
    z = mix((state + (key.row0 + row) * golden) & mask)
    return (mix((z + (column + 1) * 0xD1342543DE82EF95) & mask) >> 40) / 2**24


@pytest.mark.parametrize("seed", [0, -1, 12345, (1 << 63) + 5])
def test_hash_equals_slow_integer_loop(seed):
    key = V.ViewKey(seed, 5, 11, 1000)
    got = V.counter_uniform(key, 4, 65537, 5)
    want = torch.tensor([[slow_uniform(key, r, 65537, c) for c in range(5)] for r in range(4)])
    assert torch.equal(got, want)


def test_draws_are_uniform():
    u = V.counter_uniform(KEY, 256, 1, 256).double()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u.float(), 64, 0, 1).double()
    chi2 = ((counts - 1024) ** 2 / 1024).sum()
    assert 30 < chi2 < 110  # 63 degrees of freedom: 0.01 % tails
    for bit in range(24):  # low bits too
        share = ((u * 2**24).long() >> bit & 1).double().mean()
        assert abs(share - 0.5) < 0.008


def test_draws_are_independent_over_everything_they_depend_on():
    n = 10_000
    base = V.counter_uniform(KEY, n, 1, 2)
    others = {
        "column": base[:, 1],
        "row": base[:, 0].roll(1),
        "stream": V.counter_uniform(KEY, n, 2, 1)[:, 0],
        "view": V.counter_uniform(KEY, n, 1 + (1 << 16), 1)[:, 0],
        "seed": V.counter_uniform(V.ViewKey(8, 2, 3), n, 1, 1)[:, 0],
        "epoch": V.counter_uniform(V.ViewKey(7, 3, 3), n, 1, 1)[:, 0],
        "batch": V.counter_uniform(V.ViewKey(7, 2, 4), n, 1, 1)[:, 0],
        "swapped": V.counter_uniform(V.ViewKey(7, 3, 2), n, 1, 1)[:, 0],
    }
    for name, other in others.items():
        r = torch.corrcoef(torch.stack([base[:, 0], other]).double())[0, 1]
        assert abs(r) < 4 / math.sqrt(n), name
        assert (base[:, 0] == other).double().mean() < 1e-3, name


def test_draws_do_not_depend_on_the_split_or_on_the_number_drawn():
    whole = V.counter_uniform(KEY, 10, 3, 7)
    parts = [V.counter_uniform(KEY.shift(r), n, 3, 7) for r, n in ((0, 3), (3, 5), (8, 2))]
    assert torch.equal(whole, torch.cat(parts))
    draws = V.Draws(KEY, 10, 3)
    assert torch.equal(whole, torch.cat([draws.uniform(2), draws.uniform(5)], 1))


def test_normal_draws_have_unit_moments():
    z = V.Draws(KEY, 300, 0).normal(300)
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.1


def test_a_draw_of_zero_is_finite_and_no_event_of_probability_zero():
    assert V.Draws.normal(FixedDraws(2, 0.0, 0.0), 1).tolist() == [[0.0], [0.0]]
    assert not V.Draws.happens(FixedDraws(2, 0.0), 0.0).any()


# --- geometry


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [9, 24, 50])
def test_crop_paths_agree_with_torchvision(interpolation, size):
    x = image()
    box = torch.tensor(
        [[0, 0, 40, 32], [3, 5, 30, 11], [10, 2, 8, 25], [39, 31, 1, 1], [7, 0, 24, 24], [0, 9, 40, 9]]
    )
    xf = x.float() / 255
    mode = TF.InterpolationMode(interpolation)
    want = torch.stack(
        [TF.resized_crop(xf[i], *b, [size, size], mode, True) for i, b in enumerate(box.tolist())]
    )
    assert torch.allclose(resize_boxes(xf, box, size, interpolation), want, atol=1e-6)
    assert torch.allclose(resize_boxes_by_matrix(xf, box, size, interpolation), want, atol=2e-6)
    bytes_on_cpu = resize_boxes(x, box, size, interpolation)
    assert bytes_on_cpu.dtype is torch.uint8
    on_gpu = resize_boxes_by_matrix(x, box, size, interpolation)
    assert on_gpu.min() >= 0
    assert on_gpu.max() <= 1
    # two roundings (each axis) of half a level, amplified by the negative lobes of bicubic
    assert (bytes_on_cpu / 255 - on_gpu).abs().max() < 1.5 / 255


def test_crop_boxes_follow_the_law():
    op = V.RandomResizedCrop(8, (0.2, 0.7), (0.5, 2.0))
    box = op.boxes(100, 120, V.Draws(KEY, 5000, 0)).double()
    top, left, h, w = box.unbind(1)
    assert (top >= 0).all()
    assert (top + h <= 100).all()
    assert (left >= 0).all()
    assert (left + w <= 120).all()
    area, ratio = h * w / 12_000, w / h
    assert area.min() > 0.19
    assert area.max() < 0.71
    assert ratio.min() > 0.48
    assert ratio.max() < 2.1
    # rejection lowers the mean a little: compare with the same rule written as a loop
    generator = torch.Generator().manual_seed(0)
    slow = []
    for _ in range(3000):
        for _ in range(10):
            a = 12_000 * (0.2 + 0.5 * float(torch.rand((), generator=generator)))
            r = math.exp(math.log(2) * (2 * float(torch.rand((), generator=generator)) - 1))
            sw, sh = round(math.sqrt(a * r)), round(math.sqrt(a / r))
            if sw <= 120 and sh <= 100:
                slow.append((sw * sh / 12_000, math.log(sw / sh)))
                break
    mean_area, mean_log = torch.tensor(slow).mean(0)
    assert abs(area.mean() - mean_area) < 0.01
    assert abs(ratio.log().mean() - mean_log) < 0.04
    # corners are uniform over the allowed places
    place = top / (100 - h).clamp(min=1)
    assert abs(place[h < 90].mean() - 0.5) < 0.02


def test_crop_falls_back_to_the_largest_central_box():
    op = V.RandomResizedCrop(8, (0.9, 1.0), (3.0, 4.0))  # never fits into a square
    box = op.boxes(30, 30, V.Draws(KEY, 5, 0))
    assert box.tolist() == [[10, 0, 10, 30]] * 5


def test_flips_mirror_about_half_of_the_rows():
    x = image(400, 1, 6, 7)
    for op, dim in ((V.HorizontalFlip(0.5), 3), (V.VerticalFlip(0.3), 2)):
        out = op(x, V.Draws(KEY, 400, 0))
        mirrored = (out == x.flip(dim)).flatten(1).all(1)
        kept = (out == x).flatten(1).all(1)
        assert (mirrored | kept).all()
        assert abs(mirrored.double().mean() - op.p) < 0.08
    assert torch.equal(V.HorizontalFlip(1.0)(x, V.Draws(KEY, 400, 0)), x.flip(3))
    assert V.HorizontalFlip(0.0)(x, V.Draws(KEY, 400, 0)) is x


@pytest.mark.parametrize(
    ("degrees", "scale", "shear", "shift"),
    [
        (20, 1, 0, (0, 0)),
        (0, 1.2, 0, (0, 0)),
        (0, 1, 0.2, (0, 0)),
        (0, 1, 0, (3, -2)),
        (-15, 0.85, 0, (2, 1)),
    ],
)
def test_affine_agrees_with_torchvision(degrees, scale, shear, shift):
    x = image(2, 3, 30, 40, dtype=torch.float32)
    want = TF.affine(
        x,
        angle=-degrees,  # torchvision turns clockwise
        translate=list(shift),
        scale=scale,
        shear=[-math.degrees(math.atan(shear)), 0.0],
        interpolation=TF.InterpolationMode.BILINEAR,
    )
    op = V.RandomAffine(90, (0.5, 1.5), 0.5, 0.25)
    u = [degrees / 180 + 0.5, scale - 0.5, shear + 0.5, shift[0] / 40 / 0.5 + 0.5, shift[1] / 30 / 0.5 + 0.5]
    got = op(x, FixedDraws(2, *u, 0.0))
    inner = (..., slice(6, -6), slice(6, -6))
    assert torch.allclose(got[inner], want[inner], atol=2e-4)


def test_affine_fills_from_outside_and_spares_the_rest():
    x = torch.full((3, 2, 8, 8), 0.25)
    got = V.RandomAffine(translate=0.5, fill=1.0)(x, FixedDraws(3, 0.5, 0.5, 0.5, 1.0, 0.5, 0.0))
    assert torch.allclose(got[..., :4], torch.ones(3, 2, 8, 4))
    assert torch.allclose(got[..., 4:], torch.full((3, 2, 8, 4), 0.25))


def test_erasing_writes_one_rectangle_of_the_drawn_share():
    x = torch.ones(300, 2, 32, 32)
    out = V.RandomErasing(0.6, (0.1, 0.2), (0.5, 2.0), value=0.0)(x, V.Draws(KEY, 300, 0))
    hole = out[:, 0] == 0
    assert torch.equal(hole, out[:, 1] == 0)
    share = hole.double().mean((1, 2))
    hit = share > 0
    assert abs(hit.double().mean() - 0.6) < 0.1
    assert share[hit].min() > 0.08
    assert share[hit].max() < 0.22
    box = hole.any(2).sum(1) * hole.any(1).sum(1)
    assert torch.equal(box, hole.sum((1, 2)))


# --- colour

ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def test_jitter_equals_torchvision_in_every_order():
    orders = torch.tensor(
        [[a, b, c, d] for a in range(4) for b in range(4) for c in range(4) for d in range(4)]
    )
    orders = orders[[len(set(o)) == 4 for o in orders.tolist()]]
    n = len(orders)
    assert n == 24
    x = image(n, dtype=torch.float32)
    factor = 0.2 + 1.6 * V.counter_uniform(KEY, n, 0, 3)
    hue = V.counter_uniform(KEY, n, 1, 3) - 0.5
    got = V.ColorJitter(0.8, 0.8, 0.8, 0.5).jitter(x, orders, factor, hue)
    for i in range(n):
        want = x[i]
        for kind in orders[i].tolist():
            amount = hue[i, 0] if kind == 3 else factor[i, kind]
            want = ADJUST[kind](want, float(amount))
        assert torch.allclose(got[i], want, atol=2e-5), orders[i]


@pytest.mark.parametrize("turn", [-0.5, -0.21, 0.0, 0.1, 1 / 3, 0.5])
def test_hue_equals_torchvision_on_greys_primaries_and_ties(turn):
    x = image(5, dtype=torch.float32)
    x[0] = x[0].round()
    x[1] = x[1, :1]
    x[2, 1] = x[2, 0]
    x[3, 2] = 0
    assert torch.allclose(shift_hue(x, torch.full((5,), turn)), TF.adjust_hue(x, turn), atol=3e-6)


def test_crops_reach_the_last_pixel_and_may_have_the_whole_height():
    attempts, end = [0.0] * 10 + [0.5] * 10, 0.99999
    quarter = V.RandomResizedCrop(4, (0.25, 0.25), (1.0, 1.0))
    assert quarter.boxes(8, 8, FixedDraws(1, *attempts, end, end)).tolist() == [[4, 4, 4, 4]]
    strip = V.RandomResizedCrop(4, (0.5, 0.5), (0.25, 0.25))
    assert strip.boxes(8, 4, FixedDraws(1, *attempts, 0.0, end)).tolist() == [[0, 2, 8, 2]]


def test_a_bicubic_resize_of_bytes_stays_in_their_range():
    x = 255 * (torch.arange(64).view(1, 1, 8, 8) % 8 > 3).to(torch.uint8)
    got = V.Resize(13, "bicubic")(x, V.Draws(KEY, 1, 0))
    assert (got.min(), got.max()) == (0, 1)


def test_probabilities_and_widths_reach_the_operations():
    _, flip, down, _, _, gauss = V.simclr_views(16, flip=0.1, vertical_flip=0.3, blur_sigma=(0.5, 0.6)).views[
        0
    ]
    assert (flip.p, down.p, gauss.sigma) == (0.1, 0.3, (0.5, 0.6))


def test_an_erased_box_is_cut_to_the_image_side_by_side():
    x = torch.ones(5, 1, 20, 4)
    for ratio, area in ((5.0, 14 * 3), (20.0, 20 * 1), (0.05, 1 * 4)):
        erased = V.RandomErasing(1.0, (0.5, 0.5), (ratio, ratio))(x, V.Draws(KEY, 5, 0)) == 0
        assert erased.sum((1, 2, 3)).tolist() == [area] * 5


def test_blur_draws_its_width_from_the_given_range():
    x = image(4, dtype=torch.float32)
    got = V.GaussianBlur(5, (1.5, 1.5), p=1.0)(x, V.Draws(KEY, 4, 0))
    torch.testing.assert_close(got, blur(x, torch.full((4,), 1.5), 5))


def test_solarize_inverts_from_its_threshold_on():
    x = torch.tensor([0.24, 0.25, 0.9]).view(1, 1, 1, 3)
    got = V.Solarize(0.25, 1.0)(x, V.Draws(KEY, 1, 0))
    torch.testing.assert_close(got.flatten(), torch.tensor([0.24, 0.75, 0.1]))


def test_jitter_draws_from_its_whole_ranges():
    n = 400
    grey = torch.full((n, 4, 1, 1), 0.25)
    bright = V.ColorJitter(brightness=2.0, p=1.0)(grey, V.Draws(KEY, n, 0))
    assert bright.min() > 0, "a factor of U(0, 3), not U(-1, 3)"
    assert bright.max() == pytest.approx(0.75, abs=0.01)
    gain = V.ColorJitter(hue=0.4, p=1.0)(grey, V.Draws(KEY, n, 0)) / 0.25 - 1
    assert gain.min() == pytest.approx(-0.4, abs=0.01)
    assert gain.max() == pytest.approx(0.4, abs=0.01)
    orders: list[torch.Tensor] = []
    rare = V.ColorJitter(0.1, 0.1, 0.1, 0.1, p=0.3)
    rare.jitter = lambda part, order, *_: orders.append(order) or part
    rare(grey, V.Draws(KEY, n, 0))
    first = torch.cat(orders)[:, 0].bincount(minlength=4) / len(torch.cat(orders))
    assert (first - 0.25).abs().max() < 0.12, "whether a sample is changed tells nothing about the order"


def test_jitter_draws_each_sample_and_each_order():
    x = image(1, dtype=torch.float32).expand(600, -1, -1, -1)
    seen = []
    op = V.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    original = op.jitter
    op.jitter = lambda part, order, factor, hue: (
        seen.append((order, factor, hue)),
        original(part, order, factor, hue),
    )[1]
    out = op(x, V.Draws(KEY, 600, 0))
    order, factor, hue = seen[0]
    assert abs(len(order) / 600 - 0.8) < 0.06
    assert len({tuple(o) for o in order.tolist()}) == 24
    for column in factor.unbind(1):
        assert column.min() >= 0.6
        assert column.max() <= 1.4
        assert abs(column.mean() - 1) < 0.04
        assert column.std() > 0.2
    assert hue.abs().max() <= 0.1
    assert len(torch.unique(out.flatten(1), dim=0)) == len(order) + 1


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_colour_works_for_any_number_of_bands(channels):
    x = image(3, channels, dtype=torch.float32)
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
    factor = torch.tensor([[1.2, 0.7, 0.4], [0.8, 1.3, 1.5], [1.1, 0.5, 0.9]])
    gain = 0.2 * V.counter_uniform(KEY, 3, 0, channels) - 0.1
    got = V.ColorJitter(0.5, 0.5, 0.5, 0.1).jitter(x, order, factor, gain)
    for i in range(3):
        want = x[i]
        for kind in order[i].tolist():
            grey = want.mean(0, keepdim=True)
            if kind == 3:
                want = want * (1 + gain[i, :, None, None]) if channels > 1 else want
            else:
                target = (torch.zeros(()), grey.mean(), grey)[kind]
                want = factor[i, kind] * want + (1 - factor[i, kind]) * target
            want = want.clamp(0, 1)
        assert torch.allclose(got[i], want, atol=2e-6)
    for recipe in (V.simclr_views(16), V.byol_views(16)):
        for view in recipe(image(3, channels), KEY):
            assert view.shape == (3, channels, 16, 16)
            assert view.isfinite().all()


def test_greyscale_and_solarise_equal_torchvision():
    x = image(5, dtype=torch.float32)
    assert torch.allclose(V.Grayscale(1.0)(x, V.Draws(KEY, 5, 0)), TF.rgb_to_grayscale(x, 3), atol=1e-6)
    assert torch.equal(V.Solarize(0.5, 1.0)(x, V.Draws(KEY, 5, 0)), TF.solarize(x, 0.5))
    bands = image(5, 4, dtype=torch.float32)
    grey = V.Grayscale(1.0)(bands, V.Draws(KEY, 5, 0))
    assert torch.allclose(grey, bands.mean(1, keepdim=True).expand_as(bands))


def test_the_widest_blur_that_is_taken_runs():
    for make in (
        V.SimCLRViews(8, blur=1.0, blur_kernel=15),
        V.MoCoViews(6, blur=0.0),
        V.MoCoViews(7, blur=1.0),
    ):
        assert make(image(2), KEY)[0].isfinite().all()


@pytest.mark.parametrize("kernel", [3, 9, 23])
def test_blur_equals_torchvision_per_sample(kernel):
    x = image(4, dtype=torch.float32)
    sigma = torch.tensor([0.1, 0.5, 1.3, 2.0])
    got = blur(x, sigma, kernel)
    for i in range(4):
        want = TF.gaussian_blur(x[i], [kernel, kernel], [float(sigma[i])] * 2)
        assert torch.allclose(got[i], want, atol=2e-6)


def test_blur_kernel_is_a_tenth_of_the_height_made_odd(monkeypatch):
    sizes = []
    monkeypatch.setattr("lightning_nrml.data.views.color.blur", lambda x, s, k: (sizes.append(k), x)[1])
    for side in (8, 32, 96, 224):
        V.GaussianBlur(p=1.0)(torch.zeros(1, 1, side, side), V.Draws(KEY, 1, 0))
    assert sizes == [1, 3, 9, 23]


def test_band_jitter_follows_its_formula():
    x = image(2, 3, dtype=torch.float32)
    op = V.BandJitter(brightness=0.2, contrast=0.4, shift=0.1, clip=False)
    got = op(x, FixedDraws(2, 0.0, 0.75, 0.25, 0.9))  # applied, gain 1.1, stretch .8, shift .08
    mean = x.mean((2, 3), keepdim=True)
    assert torch.allclose(got, 1.1 * (mean + 0.8 * (x - mean)) + 0.08, atol=1e-6)
    assert torch.equal(V.BandJitter(0.2, 0.4, 0.1, 0.1, p=0.5)(x, FixedDraws(2, *[0.6] * 100_000)), x)


def test_band_jitter_noise_and_bands_are_independent():
    x = torch.full((4, 5, 40, 40), 0.5)
    out = V.BandJitter(noise=0.05)(x, V.Draws(KEY, 4, 0))
    assert abs((out - 0.5).std() - 0.05) < 0.002
    assert abs(torch.corrcoef((out - 0.5).flatten(0, 1).flatten(1))[0, 1:]).max() < 0.1
    out = V.BandJitter(brightness=0.3, per_band=True)(x, V.Draws(KEY, 4, 0))
    assert len(out[:, :, 0, 0].unique()) == 20
    out = V.BandJitter(brightness=0.3)(x, V.Draws(KEY, 4, 0))
    assert len(out[:, :, 0, 0].unique()) == 4


# --- views

RECIPES = {
    "metric": lambda: V.metric_view(
        16, degrees=10, shear=0.1, brightness=0.2, noise=0.02, saturation=0.3, hue=0.1, erasing=0.5
    ),
    "simclr": lambda: V.simclr_views(16),
    "moco": lambda: V.moco_views(16),
    "byol": lambda: V.byol_views(16),
    "multicrop": lambda: V.multicrop_views(16, 2, 8, 3, blur_kernel=3),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_views_do_not_depend_on_the_split_over_ranks(name, dtype):
    x = image(9, dtype=dtype)
    kept = x.clone()
    make = RECIPES[name]()
    state = torch.get_rng_state()
    whole = make(x, KEY)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    halves = zip(make(x[:4], KEY), make(x[4:], KEY.shift(4)), strict=True)
    for a, (b, c) in zip(whole, halves, strict=True):
        assert a.dtype is torch.float32
        assert a.is_contiguous()
        assert a.min() >= 0
        assert a.max() <= 1
        assert torch.allclose(a, torch.cat([b, c]), atol=1e-6)
    again = make(x, V.ViewKey(KEY.seed, KEY.epoch, KEY.batch + 1))
    assert not torch.allclose(whole[0], again[0], atol=0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_views_do_not_depend_on_the_chunks(name, monkeypatch):
    x = image(7)
    make = RECIPES[name]()
    whole = make(x, KEY)
    monkeypatch.setattr("lightning_nrml.data.views.base._CPU_PIXELS", 3 * 40 * 32)
    for a, b in zip(whole, make(x, KEY), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_views_of_one_image_differ_between_samples_and_views():
    x = image(1).expand(12, -1, -1, -1)
    a, b = V.simclr_views(12)(x, KEY)
    rows = torch.cat([a, b]).flatten(1)
    distance = torch.cdist(rows, rows) + torch.eye(24)
    assert distance.min() > 0.1


def test_without_a_key_the_global_seed_decides():
    x, make = image(4), V.simclr_views(12)
    torch.manual_seed(1)
    a, b = make(x)[0], make(x)[0]
    torch.manual_seed(1)
    assert torch.equal(make(x)[0], a)
    assert not torch.equal(a, b)


def test_shapes_and_order_of_the_recipes():
    x = image(2)
    sides = {name: [v.shape[-1] for v in make()(x, KEY)] for name, make in RECIPES.items()}
    assert sides == {
        "metric": [16],
        "simclr": [16, 16],
        "moco": [16, 16],
        "byol": [16, 16],
        "multicrop": [16, 16, 8, 8, 8],
    }
    assert V.simclr_views(8, num_views=4).num_views == 4


def test_byol_views_follow_different_laws():
    first, second = V.byol_views(32).views
    kinds = [[type(op).__name__ for op in ops] for ops in (first, second)]
    common = ["RandomResizedCrop", "HorizontalFlip", "ColorJitter", "Grayscale", "GaussianBlur"]
    assert kinds == [common, [*common, "Solarize"]]
    assert (first[4].p, second[4].p, second[5].p) == (1.0, 0.1, 0.2)
    assert [type(op).__name__ for op in V.byol_views(32, blur=(0, 0)).views[0]] == common[:4]


def test_recipes_have_the_published_settings():
    crop, _, jitter, grey, gauss = V.simclr_views(224).views[0]
    assert (crop.scale, crop.interpolation) == ((0.08, 1.0), "bicubic")
    assert (jitter.strength, jitter.hue, jitter.p) == ((0.8, 0.8, 0.8), 0.2, 0.8)
    assert (grey.p, gauss.p, gauss.sigma) == (0.2, 0.5, (0.1, 2.0))
    cifar = V.simclr_views(32, strength=0.5, blur=0).views[1]
    assert (cifar[2].strength, cifar[2].hue, len(cifar)) == ((0.4, 0.4, 0.4), 0.1, 4)
    crop, _, jitter, *_ = V.moco_views(224).views[0]
    assert (crop.scale, jitter.strength, jitter.hue) == ((0.2, 1.0), (0.4, 0.4, 0.4), 0.1)
    jitter = V.byol_views(224).views[0][2]
    assert (jitter.strength, jitter.hue) == ((0.4, 0.4, 0.2), 0.1)
    multi = V.multicrop_views().views
    assert [(ops[0].size, ops[0].scale) for ops in multi] == [(224, (0.14, 1.0))] * 2 + [
        (96, (0.05, 0.14))
    ] * 6


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "area"])
def test_eval_view_resizes_and_normalises(interpolation):
    x = image()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    (got,) = V.eval_view(20, mean, std, interpolation)(x)
    xf = x.float() / 255
    if interpolation == "area":
        want = F.interpolate(xf, (20, 20), mode="area")
    else:
        want = TF.resize(xf, [20, 20], TF.InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    assert torch.allclose(got, TF.normalize(want, mean, std), atol=1e-5)
    (unscaled,) = V.eval_view(20, interpolation=interpolation)(xf)
    assert torch.allclose(unscaled.clamp(0, 1), want, atol=1e-6)


def test_eval_view_takes_the_centre_and_leaves_a_fitting_image_alone():
    x = image(2, 3, 32, 32)
    (got,) = V.eval_view(28, center_fraction=0.875)(x)
    assert torch.equal(got, TF.center_crop(x, [28, 28]).float() / 255)
    assert torch.allclose(V.eval_view(32)(x)[0], x.float() / 255)


def test_float_input_is_taken_as_it_is():
    x = 5 * image(2, dtype=torch.float64) - 2
    (got,) = V.eval_view(16)(x)
    assert got.dtype is torch.float32
    assert got.min() < -0.5
    assert got.max() > 1.5


def test_metric_view_expresses_the_two_protocols():
    strokes = torch.zeros(64, 1, 105, 105)
    strokes[:, :, 30:75, 50:55] = 1
    make = V.metric_view(
        28,
        crop_scale=None,
        flip=0,
        degrees=15,
        scale=(0.85, 1.15),
        shear=0.15,
        translate=0.12,
        interpolation="area",
    )
    (out,) = make(strokes, KEY)
    assert out.shape == (64, 1, 28, 28)
    mass = out.sum((1, 2, 3))
    full = float(strokes[0].sum() / 3.75**2)
    assert (mass > 0.85**2 * full * 0.85).all()
    assert (mass < 1.15**2 * full * 1.15).all()
    # bilinear sampling of a stroke two pixels wide changes its mass by some percent
    y = torch.arange(28.0)
    centre = (out.sum((1, 3)) * y).sum(1) / mass
    # half the side is 14; shift 3.36 and the turn of a box that is a little above the centre
    assert centre.min() > 9.5
    assert centre.max() < 17.5
    assert centre.std() > 1
    ratio = (math.exp(-0.2), math.exp(0.2))
    make = V.metric_view(48, (0.4, 1.0), ratio, flip=0.5, brightness=0.2, shift=0.1)
    (out,) = make(torch.full((500, 3, 96, 96), 128, dtype=torch.uint8), KEY)
    level = out.flatten(1)
    assert (level.amax(1) - level.amin(1)).max() < 1e-5
    level = level.mean(1)
    assert level.min() > 0.8 * 0.502 - 0.1
    assert level.max() < 1.2 * 0.502 + 0.1
    assert abs(level.mean() - 0.502) < 0.01
    assert abs(level.std() - math.hypot(0.502 * 0.4, 0.2) / math.sqrt(12)) < 0.01


def test_views_stay_float32_under_autocast_and_hold_no_state():
    make = V.simclr_views(12, mean=(0.5,) * 3, std=(0.2,) * 3)
    with torch.autocast("cpu", torch.bfloat16):
        a = make(image(3), KEY)[0]
    assert a.dtype is torch.float32
    assert torch.equal(a, make(image(3), KEY)[0])
    assert not make.state_dict()
    assert not list(make.parameters())
    assert torch.equal(copy.deepcopy(make)(image(3), KEY)[0], a)


def test_a_user_can_write_an_operation():
    class Invert(V.ViewOp):
        def forward(self, image, draws):
            return 255 - image

    x = image(3)
    (out,) = V.Views([[V.HorizontalFlip(0.0), Invert()]])(x, KEY)
    assert torch.allclose(out, 1 - x.float() / 255, atol=1e-6)
    with pytest.raises(NotImplementedError, match="must implement forward"):
        V.ViewOp()(x, V.Draws(KEY, 3, 0))


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"\(B, channels, H, W\).*\(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, "empty"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int16), TypeError, "int16"),
        (torch.zeros(2, 13, 8, 8), ValueError, "3 channels but the image has 13"),
    ],
)
def test_bad_images_are_named(x, error, says):
    with pytest.raises(error, match=says):
        V.eval_view(4, (0.5,) * 3, (0.2,) * 3)(x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: V.eval_view(4, mean=(0.5,)), "together"),
        (lambda: V.eval_view(4, (0.5,), (0.1, 0.1)), "std has 2"),
        (lambda: V.eval_view(4, (0.5,), (0.0,)), "positive"),
        (lambda: V.eval_view(4, center_fraction=1.5), "center_fraction"),
        (lambda: V.Views([]), "empty"),
        (lambda: V.metric_view(4, crop_scale=(0.5, 1.5)), "share"),
        (lambda: V.metric_view(4, ratio=(2.0, 1.0)), "ratio"),
        (lambda: V.metric_view(4, interpolation="area"), "area"),
        (lambda: V.metric_view(4, scale=(1.2, 0.9)), "magnification"),
        (lambda: V.ColorJitter(hue=0.7), "hue"),
        (
            lambda: V.SimCLRViews(8, blur_kernel=17),
            "blur_kernel is 17, too wide for crops of 8 pixels: give at",
        ),
        (lambda: V.MoCoViews(6), "at most 11, None"),
        (lambda: V.BYOLViews(8, blur=(0.0, 0.1), blur_kernel=17), "too wide for crops of 8 pixels"),
        (lambda: V.MultiCropViews(32, small_size=6), "too wide for crops of 6 pixels"),
        (lambda: V.BandJitter(noise=-1), ">= 0"),
        (lambda: V.GaussianBlur(4), "odd"),
        (lambda: V.GaussianBlur(3, (0.0, 1.0)), "sigma"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_views_can_stand_in_a_configuration_file():
    from jsonargparse import ArgumentParser

    def instantiate(parser, text):
        make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in 4.49
        return make(parser.parse_string(text)).views

    parser = ArgumentParser()
    parser.add_argument("--views", type=V.Views)
    text = """
    views:
      class_path: lightning_nrml.data.views.MetricView
      init_args: {size: 28, crop_scale: null, flip: 0, degrees: 15, scale: [.85, 1.15], mean: [.1], std: [.3]}
    """
    made = instantiate(parser, text)
    assert isinstance(made, V.MetricView)
    assert made(torch.zeros(2, 1, 40, 40), KEY)[0].shape == (2, 1, 28, 28)
    text = """
    views:
      class_path: lightning_nrml.data.views.Views
      init_args:
        views:
          - - {class_path: lightning_nrml.data.views.RandomResizedCrop, init_args: {size: 12}}
            - {class_path: lightning_nrml.data.views.Solarize, init_args: {p: 1.0}}
          - - {class_path: lightning_nrml.data.views.Resize, init_args: {size: 6, interpolation: area}}
    """
    made = instantiate(parser, text)
    assert [v.shape[-1] for v in made(image(2), KEY)] == [12, 6]


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_views_are_the_same_on_a_gpu(name):
    make, x = RECIPES[name](), image(9)
    assert torch.equal(V.counter_uniform(KEY, 9, 1, 5, "cuda").cpu(), V.counter_uniform(KEY, 9, 1, 5))
    on_cpu = make(x.float() / 255, KEY)
    on_gpu = make.to("cuda")(x.float().div(255).cuda(), KEY)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.is_cuda
        assert (a - b.cpu()).abs().mean() < 1e-3
