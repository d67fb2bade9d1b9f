"""kornia's augmentations inside our views: per-sample, reproducible, and named when they are wrong."""

from __future__ import annotations

import pytest
import torch

from lightning_nrml.data.views import KorniaOp, ViewKey, Views


def _image() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1)


def test_samples_differ_and_the_key_decides() -> None:
    view = Views([[KorniaOp("ColorJiggle", {"brightness": 0.5, "p": 1.0})]])
    one, again, other = (view(_image(), ViewKey(0, 0, b))[0] for b in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({round(float(v), 5) for v in one.mean((1, 2, 3))}) > 4


def test_the_global_generator_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Views([[KorniaOp("RandomHorizontalFlip", {"p": 0.5})]])(_image(), ViewKey(1))
    assert torch.equal(torch.rand(4), expected)


def test_uint8_is_scaled_and_shape_is_kept() -> None:
    image = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    out = Views([[KorniaOp("RandomHorizontalFlip", {"p": 1.0})]])(image, ViewKey(0))[0]
    assert out.shape == image.shape
    assert float(out.min()) == 1.0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"no class 'RandomHorizontalFlop'.*RandomHorizontalFlip"):
        KorniaOp("RandomHorizontalFlop")
    with pytest.raises(ValueError, match="does not take these arguments"):
        KorniaOp("RandomHorizontalFlip", {"probability": 0.5})
