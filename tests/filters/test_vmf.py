"""The von Mises-Fisher normaliser against tabulated, closed-form and library values."""

import math

import pytest
import torch
from scipy import special

from lightning_nrml.filters.vmf import concentration, log_normalizer


def test_high_dimension_matches_forty_digit_values():
    kappa = torch.tensor([1.0, 50.0, 100.0, 300.0, 1000.0, 5000.0])
    want = [867.967127, 865.538149, 858.379265, 790.808084, 327.709187, -3286.933014]
    got = log_normalizer(kappa, 512)
    assert got.dtype is torch.float64
    assert got.tolist() == pytest.approx(want, abs=1e-6)


def test_three_dimensions_match_the_closed_form():
    # C_3(kappa) = kappa / (4 pi sinh(kappa))
    kappa = torch.tensor([1e-3, 0.1, 1.0, 2.0, 5.0, 10.0, 100.0, 600.0], dtype=torch.float64)
    want = (kappa / (4 * math.pi * torch.sinh(kappa))).log()
    assert torch.allclose(log_normalizer(kappa, 3), want, rtol=0, atol=1e-7)
    assert log_normalizer(torch.tensor(5.0), 3).item() == pytest.approx(-5.228394, abs=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 4, 16, 63, 64, 127, 128, 129, 130, 131])
def test_matches_the_library_bessel_function_where_that_does_not_underflow(dim):
    kappa = torch.tensor([5.0, 20.0, 60.0, 200.0, 900.0, 1e4], dtype=torch.float64)
    order = dim / 2 - 1
    log_bessel = torch.from_numpy(special.ive(order, kappa.numpy())).log() + kappa
    want = order * kappa.log() - dim / 2 * math.log(2 * math.pi) - log_bessel
    assert torch.allclose(log_normalizer(kappa, dim), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dim", [2, 3, 128, 512, 2048])
def test_zero_concentration_is_the_uniform_density(dim):
    log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    assert log_normalizer(torch.zeros(2), dim).tolist() == pytest.approx([-log_area] * 2, abs=2e-7)


@pytest.mark.parametrize("dim", [2, 8, 512])
def test_finite_from_zero_to_huge_concentrations_and_falling(dim):
    kappa = torch.logspace(-6, 8, 200, dtype=torch.float64)
    value = log_normalizer(kappa, dim)
    assert value.isfinite().all()
    # d/dkappa log C = -A_d(kappa), a mean cosine: between -1 and 0
    slope = value.diff() / kappa.diff()
    assert (slope <= 1e-6).all()
    assert (slope >= -1 - 1e-6).all()


def test_dimension_one_is_refused():
    with pytest.raises(ValueError, match="dim must be at least 2"):
        log_normalizer(torch.ones(1), 1)


def test_concentration_formula_and_clamp():
    rbar = torch.tensor([0.0, math.sqrt(3) / 2, 1.0], dtype=torch.float64)
    kappa = concentration(rbar, 3, max_rbar=0.99)
    assert kappa[:2].tolist() == pytest.approx([0, 7.794229], abs=1e-6)
    assert kappa[2].item() == pytest.approx(0.99 * (3 - 0.99**2) / (1 - 0.99**2))
    assert concentration(torch.tensor([0.5, 0.9]), 512).tolist() == pytest.approx([341.17, 2421.43], abs=1e-2)


def test_normaliser_is_not_harmless_to_drop():
    # log-densities at cos .5 and .9 of a loose and a tight class cross over
    kappa = concentration(torch.tensor([0.5, 0.9], dtype=torch.float64), 512)
    at = {c: (log_normalizer(kappa, 512) + kappa * c).tolist() for c in (0.5, 0.9)}
    assert at[0.5] == pytest.approx([941.58, 324.01], abs=1e-2)
    assert at[0.9] == pytest.approx([1078.05, 1292.58], abs=1e-2)
