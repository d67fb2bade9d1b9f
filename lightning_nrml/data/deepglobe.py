"""DeepGlobe land cover as a multi-label set: tiles of aerial images and the classes that their masks show."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_nrml.data.decode import DECODE_ERRORS
from lightning_nrml.data.multilabel_tables import (
    find_images,
    read_label_lists,
    split_rows,
)
from lightning_nrml.data.noise_types import uniform
from lightning_nrml.data.remote_sensing import MultiLabelRemoteSensing
from lightning_nrml.data.sources import BadImageError, DecodingSource, FileSource
from lightning_nrml.data.splits import SPLIT_NAMES, Split, Splits
from lightning_nrml.files import whole_file

#: label order of the multi-label version
CLASSES = ("urban", "agricultural", "rangeland", "forest", "water", "barren")
# colour of a mask, each channel above 127 or not, as r * 4 + g * 2 + b -> class; 6 = unknown
_CLASS_OF_COLOUR = np.asarray([6, 4, 3, 0, 6, 2, 1, 5], dtype=np.uint8)
_SPELLINGS = {
    name: c
    for c, first in enumerate(CLASSES)
    for name in (first, f"{first} land", f"{first}_land", f"{first}_area")
} | dict.fromkeys(("agriculture", "agriculture land", "agriculture_land"), 1)


class DeepGlobeDataModule(MultiLabelRemoteSensing):
    """DeepGlobe land cover (Demir et al., CVPR workshops 2018, arXiv 1805.06561) with six labels.

    Two layouts:

    * a label table: ``labels.parquet`` with a column of image names and one with lists of label names, lists
      ``train.csv``, ``val.csv``, ``test.csv`` without header, and the images below ``images/``. The
      multi-label version in use keeps its images as pickles in an LMDB. These are not read, for unpickling
      can run code: convert them to PNG.
    * the masks: ``<id>_sat.jpg`` and ``<id>_mask.png`` of 2448 x 2448 in any folder below ``path``. Images
      are divided into tiles; a class labels a tile if it covers more than ``min_share`` of it. Splits go by
      image, so that no tile has a neighbour in another split. Masks are read once; their shares are kept in
      ``statistics_folder``. Tiles without any label are left out.

    From masks a tile means decoding its whole image: set ``cache: true`` (20 tiles of each of 803 images take
    3 GB). How the published version cut its tiles is not known.

    Args:
        path: folder of the data set.
        tile: side of a tile, in pixels of the masks.
        tiles_per_image: so many positions of the grid, drawn for each image; ``None`` = all of them.
        min_share: a class must cover more than this share of a tile, in [0, 1).
        fractions: shares of the images that train and validate; the rest is the test split.
        split_seed: of the split and of the positions.
        image_size: side that tiles and images are resized to; ``None`` keeps the stored size.
        kwargs: ``normalize`` and ``statistics_folder``, see :class:`RemoteSensing`, and those of
            :class:`NRMLDataModule`; ``m_per_class`` and ``epoch_length`` need single labels.
    """

    def __init__(
        self,
        path: str,
        tile: int = 256,
        tiles_per_image: int | None = 20,
        min_share: float = 0.03,
        fractions: tuple[float, float] = (0.7, 0.1),
        split_seed: int = 0,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if tile < 1 or (tiles_per_image is not None and tiles_per_image < 1):
            raise ValueError(f"tile {tile} and tiles_per_image {tiles_per_image} must be at least 1")
        if not 0 <= min_share < 1:
            raise ValueError(f"min_share must lie in [0, 1), got {min_share}")
        if fractions[0] <= 0 or fractions[1] < 0 or sum(fractions) > 1:
            raise ValueError(f"fractions must be positive and at most 1 together, got {fractions}")
        self.path, self.tile, self.tiles_per_image = Path(path).expanduser(), tile, tiles_per_image
        self.min_share, self.fractions, self.split_seed = min_share, fractions, split_seed
        self.image_size = image_size
        self._label_names = list(CLASSES)

    def load_splits(self) -> Splits:
        table = self.path / "labels.parquet"
        parts = self._from_table(table) if table.is_file() else self._from_masks()
        return Splits(parts["train"], parts.get("test"), len(CLASSES), parts.get("val"), list(CLASSES))

    # ---- the label table -------------------------------------------------------------------------

    def _from_table(self, path: Path) -> dict[str, Split]:
        table = read_label_lists(path, CLASSES, _SPELLINGS)
        usual = {name: self.path / f"{name}.csv" for name in SPLIT_NAMES}
        lists = {name: file for name, file in usual.items() if file.is_file() or name == "train"}
        rows = split_rows(table, lists)
        files = [str(file) for file in find_images(table.images, self.path / "images")]
        return {
            name: Split(
                FileSource([files[i] for i in at], 3, self.image_size, "squash"),
                table.label[at],
                paths=[table.images[i] for i in at],
            )
            for name, at in rows.items()
        }

    # ---- the masks -------------------------------------------------------------------------------

    def _from_masks(self) -> dict[str, Split]:
        files = self._pairs()
        shares = self._shares([mask for _, mask in files])
        order = np.argsort([self._hash(mask) for _, mask in files], kind="stable")
        ends = np.round(np.cumsum(self.fractions) * len(files)).astype(int)
        parts: dict[str, Split] = {}
        for name, chosen in zip(SPLIT_NAMES, np.split(order, ends), strict=True):
            tiles = [(i, t) for i in np.sort(chosen) for t in self._positions(files[i][1], shares[i])]
            label = np.asarray(
                [shares[i].reshape(-1, 6)[t] > self.min_share for i, t in tiles], dtype=np.int64
            )
            kept = [tile for tile, row in zip(tiles, label.reshape(-1, 6), strict=True) if row.any()]
            if not kept and name != "train":
                continue
            places = [(files[i][0], *divmod(int(t), shares[i].shape[1])) for i, t in kept]
            images = TileSource(
                [str(p[0]) for p in places], [p[1:] for p in places], self.tile, self.image_size
            )
            paths = [f"{p[0].stem.removesuffix('_sat')}_{p[1]}_{p[2]}" for p in places]
            parts[name] = Split(images, label[label.any(1)] if len(label) else label, paths=paths)
        return parts

    def _pairs(self) -> list[tuple[Path, Path]]:
        masks = sorted(self.path.rglob("*_mask.png"))
        if not masks:
            raise FileNotFoundError(
                f"no DeepGlobe in {self.path}: there is neither labels.parquet nor any <id>_mask.png"
            )
        return [(mask.with_name(f"{mask.name.removesuffix('_mask.png')}_sat.jpg"), mask) for mask in masks]

    def _hash(self, mask: Path) -> int:
        """A random number below 2**48 that depends on the seed and the name alone, not on other images."""
        return int(hashlib.sha256(f"{self.split_seed}/{mask.name}".encode()).hexdigest()[:12], 16)

    def _positions(self, mask: Path, shares: np.ndarray) -> np.ndarray:
        """Numbers of the tiles of an image, in the order of the grid."""
        count = shares.shape[0] * shares.shape[1]
        if self.tiles_per_image is None or self.tiles_per_image >= count:
            return np.arange(count)
        (draw,) = uniform(self._hash(mask), 1, count)
        return np.sort(np.argsort(draw, kind="stable")[: self.tiles_per_image])

    def _shares(self, masks: Sequence[Path]) -> list[np.ndarray]:
        """Share of each class in each tile, ``(rows, columns, 6)`` per mask; read once and kept."""
        digest = hashlib.sha256(repr(self.tile).encode())
        for mask in masks:
            stat = mask.stat()
            digest.update(repr((str(mask.resolve()), stat.st_size, stat.st_mtime_ns)).encode())
        file = Path(self.statistics_folder).expanduser() / f"deepglobe_{digest.hexdigest()[:16]}.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as kept:
                return [kept[f"arr_{i}"] for i in range(len(masks))]
        shares = [mask_shares(mask, self.tile) for mask in masks]
        with whole_file(file) as part:
            np.savez(part, *shares)
        return shares


def mask_shares(path: Path, tile: int) -> np.ndarray:
    """Share of each of the six classes in the tiles of a mask, ``(rows, columns, 6)`` float32.

    Colours are cut at 128 first, as the makers advise; unknown ones count for no class. What is left over at
    the right and lower edge of the grid is not used.

    Raises:
        BadImageError: the mask cannot be read.
        ValueError: it is smaller than a tile.
    """
    try:
        with Image.open(path) as image:
            colour = np.asarray(image.convert("RGB")) >= 128
    except DECODE_ERRORS as error:
        raise BadImageError(
            f"cannot read {path} ({type(error).__name__}: {error}); mend or remove it"
        ) from error
    rows, columns = colour.shape[0] // tile, colour.shape[1] // tile
    if not rows or not columns:
        raise ValueError(f"{path} is {colour.shape[0]} x {colour.shape[1]}, smaller than a tile of {tile}")
    kind = _CLASS_OF_COLOUR[colour @ np.asarray([4, 2, 1])][: rows * tile, : columns * tile]
    blocks = kind.reshape(rows, tile, columns, tile)
    return np.stack([(blocks == c).mean((1, 3)) for c in range(6)], axis=-1).astype(np.float32)


class TileSource(DecodingSource):
    """Tiles of large images as uint8 RGB; neighbours share the decoding of their image.

    Args:
        paths: N files of images.
        places: row and column of each tile in the grid.
        tile: side of a tile.
        image_size: side to resize to; ``None`` keeps ``tile``.
    """

    def __init__(
        self,
        paths: Sequence[str],
        places: Sequence[tuple[int, int]],
        tile: int,
        image_size: int | None = None,
    ) -> None:
        super().__init__(3, image_size or tile, "squash")
        self.paths, self.tile, self.image_size = np.asarray(paths, dtype=np.str_), tile, image_size
        self.places = np.asarray(places, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return f"tile {self.places[row].tolist()} of {self.paths[row]}"

    def missing(self) -> list[int]:
        there = {path: Path(path).is_file() for path in set(self.paths.tolist())}
        return [row for row, path in enumerate(self.paths.tolist()) if not there[path]]

    def reading(self) -> tuple[object, ...]:
        return *super().reading(), self.tile, self.places.tolist()

    def files(self) -> Iterable[str]:
        return map(str, self.paths)

    def subset(self, rows: np.ndarray) -> TileSource:
        places = [(int(r), int(c)) for r, c in self.places[rows]]
        return TileSource(self.paths[rows].tolist(), places, self.tile, self.image_size)

    def open(self, row: int) -> Image.Image:
        image = _decoded(str(self.paths[row]))
        top, left = (int(p) * self.tile for p in self.places[row])
        if left + self.tile > image.width or top + self.tile > image.height:
            raise ValueError(f"the image is {image.height} x {image.width}, smaller than its mask")
        return image.crop((left, top, left + self.tile, top + self.tile))


@lru_cache(maxsize=4)
def _decoded(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
