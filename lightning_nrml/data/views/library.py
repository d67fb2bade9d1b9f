"""Any augmentation of kornia as one operation of a view."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

from lightning_nrml.data.views.base import ViewOp, as_float
from lightning_nrml.data.views.rng import Draws


class KorniaOp(ViewOp):
    """A kornia augmentation by its class name, for everything that this package has no own operation for.

    Every sample draws its own parameters. They come from torch's global generator, seeded for this call
    from the view's key and put back afterwards: reproducible under seed and resume, but, unlike our own
    operations, not equal for different splits of a global batch over ranks.

    Args:
        name: class in ``kornia.augmentation``, such as ``"RandomPlasmaShadow"``.
        kwargs: its arguments; ``same_on_batch`` stays off.

    Raises:
        ValueError: unknown name (tells the nearest), or arguments that it does not take.
    """

    def __init__(self, name: str, kwargs: dict[str, Any] | None = None) -> None:
        super().__init__()
        import kornia.augmentation as library

        found = getattr(library, name, None)
        if not isinstance(found, type):
            names = [n for n in dir(library) if n[:1].isupper()]
            near = difflib.get_close_matches(name, names, n=3)
            raise ValueError(
                f"kornia.augmentation has no class '{name}'. Nearest: {', '.join(near) or 'none'}."
            )
        try:
            self.operation = found(**(kwargs or {}))
        except TypeError as error:
            raise ValueError(f"kornia's {name} does not take these arguments: {error}.") from error

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Run it in float32 on values in [0, 1]."""
        seed = int(draws.uniform(1)[0, 0].double() * 2**24)
        devices = [image.device] if image.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            out: Tensor = self.operation(as_float(image))
        return out
