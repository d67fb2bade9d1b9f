"""Omniglot: many classes with few images each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.npz import Npz, use_noise_list
from lightning_nrml.data.sources import MemorySource
from lightning_nrml.data.splits import Splits, split_by_rows
from lightning_nrml.data.views import EvalView, MetricView, Views

SIDE = 105
_BYTES = -(-SIDE * SIDE // 8)  # of a drawing
# of the train images pooled to 28 x 28, in units of [0, 1]
MEAN, STD = (0.078,), (0.225,)
_ORIGIN = (
    "OmniglotDataModule reads an npz with the arrays bits (N, 1379) uint8, label and background, packed from "
    "github.com/brendenlake/omniglot"
)


class OmniglotDataModule(NRMLDataModule):
    """1,623 handwritten characters of 50 alphabets by 20 drawers (Lake et al., Science 350, 2015).

    Zero-shot: trains on the 964 background characters (19,280 images) and tests on the 659 of the other
    20 alphabets (13,180). Ink is bright. The file holds ``bits`` (N, 1379) uint8, the 105 x 105 pixels
    row by row and eight to a byte, ``label`` (N,) and ``background`` (N,) bool.

    Args:
        path: the npz file.
        image_size: side to pool to by area, 1 to 105.
        noise_list: ``"file.npz:array"`` of given train labels; the file may lie beside ``path``.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(self, path: str, image_size: int = 28, noise_list: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= image_size <= SIDE:
            raise ValueError(f"image_size must be 1 to {SIDE}, the stored side, got {image_size}")
        self.path, self.image_size, self.noise_list = path, image_size, noise_list

    def default_train_view(self) -> Views:
        """Affine changes of a drawing; no flip, for a mirrored character is another class."""
        return MetricView(
            self.image_size,
            crop_scale=None,
            flip=0.0,
            degrees=15,
            scale=(0.85, 1.15),
            shear=0.15,
            translate=0.12,
            mean=MEAN,
            std=STD,
        )

    def default_eval_view(self) -> Views:
        """The drawing, standardised as in training."""
        return EvalView(self.image_size, mean=MEAN, std=STD)

    def load_splits(self) -> Splits:
        npz = Npz(self.path, _ORIGIN)
        bits, label, background = npz["bits"], npz["label"], npz["background"].astype(bool)
        if bits.dtype != np.uint8 or bits.ndim != 2 or bits.shape[1] != _BYTES:
            raise ValueError(
                f"{npz.path}: bits must be (N, {_BYTES}) uint8, {SIDE} x {SIDE} pixels by eight, got "
                f"{bits.shape} {bits.dtype}; pack them with numpy.packbits"
            )
        if len(label) != len(background):
            raise ValueError(
                f"{npz.path} has {len(label)} labels but {len(background)} entries of background; give "
                "one of each per drawing"
            )
        splits = split_by_rows(
            MemorySource(unpack(bits, self.image_size)),
            label,
            {"train": np.flatnonzero(background), "test": np.flatnonzero(~background)},
            where=str(npz.path),
        )
        if self.noise_list is not None:
            use_noise_list(splits, self.noise_list, npz.path)
        return splits


def unpack(bits: np.ndarray, image_size: int, rows: int = 2048) -> Tensor:
    """Packed bits ``(N, 1379)`` to uint8 ``(N, 1, s, s)``: share of ink under each pixel times 255."""
    parts = []
    for start in range(0, len(bits), rows):
        ink = np.unpackbits(bits[start : start + rows], axis=1)[:, : SIDE * SIDE].reshape(-1, 1, SIDE, SIDE)
        pooled = F.adaptive_avg_pool2d(torch.from_numpy(ink).float(), image_size)
        parts.append((pooled * 255).round_().to(torch.uint8))
    return torch.cat(parts)
