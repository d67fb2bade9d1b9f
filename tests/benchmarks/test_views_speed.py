"""Two SimCLR views per image, beside torchvision v2. Run with ``pytest -m benchmark -s``."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from lightning_nrml.data.views import ViewKey, simclr_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_view(size):
    """The same law, for one uint8 image."""
    kernel = size // 10 // 2 * 2 + 1
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def median_seconds(call, calls=3):
    """Median CPU seconds of the process after one warm-up call."""
    call()
    seconds = []
    for _ in range(calls):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return sorted(seconds)[calls // 2]


@pytest.mark.benchmark
@pytest.mark.parametrize(("source", "size", "rows"), [(64, 64, 256), (96, 64, 256), (256, 224, 32)])
def test_images_per_second(source, size, rows):
    coarse = torch.rand(rows, 3, 8, 8)
    image = (F.interpolate(coarse, (source, source), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    peer = torchvision_view(size)
    ours = {
        mode: simclr_views(size, mean=MEAN, std=STD, interpolation=mode) for mode in ("bilinear", "bicubic")
    }
    rate = {
        f"ours, {mode} crop": rows / median_seconds(lambda make=make: make(image, ViewKey(0)))
        for mode, make in ours.items()
    }
    two_views = lambda: [torch.stack([peer(x) for x in image]) for _ in range(2)]  # noqa: E731
    rate["torchvision v2, bilinear crop, one image at a time"] = rows / median_seconds(two_views)
    print(f"\n{source} -> {size}, two views, images per CPU second on one thread:")
    for name, value in rate.items():
        print(f"  {name}: {value:.0f}")
    assert all(view.shape == (rows, 3, size, size) for view in ours["bilinear"](image))
