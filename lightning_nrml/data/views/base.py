"""The frame of on-device augmentation: operations, and the module that makes views out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_nrml.data.views.rng import Draws, ViewKey

# Source pixels handled at a time on the CPU: keeps the intermediate images in the cache.
_CPU_PIXELS = 1 << 19


def as_float(image: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]; floating input to float32, values untouched."""
    if image.dtype is torch.uint8:
        return image.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    return image.to(torch.float32)


def in_own_units(image: Tensor) -> Tensor:
    """``(B,)`` bool on the CPU: float images with a value outside [0, 1], such as counts or decibels."""
    if image.dtype is torch.uint8:
        return torch.zeros(len(image), dtype=torch.bool)
    return ((image < 0) | (image > 1)).flatten(1).any(1).cpu()


def on_rows(image: Tensor, rows: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply ``change(part, chosen)`` to some rows of a batch only.

    Args:
        image: ``(B, C, H, W)``; left as it is.
        rows: ``(B,)`` bool on the CPU, so that nothing waits for the accelerator.
        change: gets the chosen rows and their numbers ``(n,)`` int64 on the CPU; must keep the shape.
    """
    chosen = rows.nonzero()[:, 0]
    if len(chosen) == 0:
        return image
    if len(chosen) == len(rows):
        return change(image, chosen)
    if image.device.type == "cpu":
        # several times as fast as index_copy there
        parts = list(image.unbind())
        numbers = chosen.tolist()
        for i, row in zip(numbers, change(image[chosen], chosen).unbind(), strict=True):
            parts[i] = row
        return torch.stack(parts)
    where = chosen.to(image.device, non_blocking=True)
    return image.index_copy(0, where, change(image.index_select(0, where), chosen))


class ViewOp(nn.Module):
    """Base class of one augmentation step with its own parameters for every sample.

    Subclasses write ``forward(image, draws)``: ``image`` is ``(B, C, H, W)``, uint8 or float32 in [0, 1]
    (call :func:`as_float` where arithmetic is done), and must not be written into; all randomness comes
    from ``draws``. Float images may be in units of their own instead; ``draws.own_units`` tells which.
    """

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Return the changed batch ``(B, C, h, w)``."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward(image, draws).")


class Views(nn.Module):
    """Makes one or several augmented views of a batch, on the batch's own device.

    Every sample draws its own parameters from a counter-based generator (:mod:`.rng`), so the result
    does not depend on how a global batch is split over ranks.

    Args:
        views: for each view, its operations in order.
        mean: per-channel mean to subtract at the end, in units of [0, 1]; ``None`` = no normalisation.
        std: per-channel standard deviation to divide by; needs ``mean``.

    Raises:
        ValueError: if the views or the normalisation are not usable.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        views: list[list[ViewOp]],
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        if not views:
            raise ValueError("views is empty; give at least one list of operations.")
        self.views = nn.ModuleList(nn.ModuleList(ops) for ops in views)
        self._set_normalisation(mean, std)

    @property
    def num_views(self) -> int:
        """Length of the list that ``forward`` returns."""
        return len(self.views)

    def _set_normalisation(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        if (mean is None) != (std is None):
            raise ValueError("mean and std must be given together (or both left out).")
        if mean is not None and std is not None:
            if len(mean) != len(std):
                raise ValueError(f"mean has {len(mean)} channels but std has {len(std)}; give one of each.")
            if min(std) <= 0:
                raise ValueError(f"std must be positive in every channel, got {list(std)}.")
        shape = (1, -1, 1, 1)
        # Not persistent: they come from the configuration, and a checkpoint must load with other views.
        for name, value in (("mean", mean), ("std", std)):
            buffer = None if value is None else torch.tensor(list(value), dtype=torch.float32).view(shape)
            self.register_buffer(name, buffer, persistent=False)

    def _check(self, image: Tensor) -> None:
        if image.ndim != 4 or 0 in image.shape:
            raise ValueError(
                f"Views take a batch (B, channels, H, W) without empty dimensions, got shape "
                f"{tuple(image.shape)}; add the batch dimension with image[None]."
            )
        if image.dtype is not torch.uint8 and not image.is_floating_point():
            raise TypeError(
                f"Views take uint8 or floating images, got {image.dtype}; scale other integer types to "
                f"[0, 1] first."
            )
        if self.mean is not None and self.mean.shape[1] != image.shape[1]:
            raise ValueError(
                f"mean and std have {self.mean.shape[1]} channels but the image has {image.shape[1]}; "
                f"give one number per channel, or None for no normalisation."
            )

    def _one_view(self, image: Tensor, number: int, key: ViewKey, own_units: Tensor) -> Tensor:
        ops = cast(nn.ModuleList, self.views[number])
        for step, op in enumerate(ops):
            image = op(image, Draws(key, image.shape[0], (number << 16) + step, own_units))
        image = as_float(image)
        if self.mean is not None and self.std is not None:
            return (image - self.mean).div_(self.std)
        return image.contiguous()

    @torch.no_grad()
    def forward(self, image: Tensor, key: ViewKey | None = None) -> list[Tensor]:
        """Augment a batch.

        Args:
            image: ``(B, C, H, W)``; uint8 is scaled to [0, 1], floating input is taken as it is. An image
                with a value outside [0, 1] is in units of its own, in which colour operations do not clip.
            key: names the random numbers; ``None`` draws a fresh seed from torch's global generator.

        Returns:
            One float32 tensor ``(B, C, h, w)`` per view.

        Raises:
            ValueError: on a wrong shape or number of channels.
            TypeError: on an integer type other than uint8.
        """
        self._check(image)
        if key is None:
            key = ViewKey(int(torch.randint(1 << 62, ())))
        rows = len(image)
        # Told to all operations: after a bicubic crop images in [0, 1] pass its ends, too.
        own_units = in_own_units(image)
        with torch.autocast(image.device.type, enabled=False):
            if image.device.type != "cpu":
                return [self._one_view(image, view, key, own_units) for view in range(self.num_views)]
            chunk = max(1, _CPU_PIXELS // (image.shape[2] * image.shape[3]))
            parts: list[list[Tensor]] = [[] for _ in self.views]
            for start in range(0, rows, chunk):
                part, own = image[start : start + chunk], own_units[start : start + chunk]
                if part.dtype is torch.uint8 and part.shape[1] == 3:
                    # torch's resize of interleaved bytes is several times as fast as any other
                    part = part.contiguous(memory_format=torch.channels_last)
                for view, done in enumerate(parts):
                    done.append(self._one_view(part, view, key.shift(start), own))
        return [done[0] if len(done) == 1 else torch.cat(done) for done in parts]
