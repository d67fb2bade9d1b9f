"""EuroSAT: 27,000 Sentinel-2 patches of 64 x 64 in ten classes of land use, one per patch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_nrml.data.folder import list_classes
from lightning_nrml.data.multilabel_tables import MultiLabelTable, split_rows
from lightning_nrml.data.raster import RasterSource
from lightning_nrml.data.remote_sensing import RemoteSensing
from lightning_nrml.data.sources import FileSource, ImageSource
from lightning_nrml.data.splits import SPLIT_NAMES, Splits, split_by_rows

CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
#: bands in the order of the 13-band files, where B8A comes last
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
_RGB = [BANDS.index(band) + 1 for band in ("B04", "B03", "B02")]
# where the archives of the RGB and of the 13-band copy put the class folders
_FOLDERS = (
    ".",
    "2750",
    "EuroSAT_RGB",
    "EuroSAT_MS",
    "EuroSAT",
    "tif",
    "ds/images/remote_sensing/otherDatasets/sentinel_2/tif",
)


class EuroSATDataModule(RemoteSensing):
    """EuroSAT (Helber et al., IEEE JSTARS 2019, arXiv 1709.00029), RGB JPEGs or 13-band GeoTIFFs.

    Class folders are looked for in ``path`` and where the two archives have them (``2750/``, ``tif/``, ...).
    13-band images are float32 in counts (top-of-atmosphere reflectance x 10,000). Every class trains: for
    unseen test classes use :class:`FolderDataModule`.

    Args:
        path: folder of the archive.
        bands: ``rgb`` reads the JPEGs; ``all`` the 13 bands of the GeoTIFFs in their files' order (B8A last);
            a list such as ``[B04, B08]`` chooses among these.
        splits: text file of image names (``Forest_12.jpg``, for GeoTIFFs too) for each of ``train``, ``val``,
            ``test``, relative to ``path``; default ``eurosat-{train,val,test}.txt`` if they are there, else a
            division at random within each class.
        train_fraction: share of each class that trains without lists, inside (0, 1).
        val_fraction: share that validates; the rest is the test split.
        split_seed: of the division.
        image_size: side of the square that images are brought to.
        kwargs: ``normalize`` and ``statistics_folder``, see :class:`RemoteSensing`, and those of
            :class:`NRMLDataModule`.
    """

    def __init__(
        self,
        path: str,
        bands: str | list[str] = "rgb",
        splits: dict[str, str] | None = None,
        train_fraction: float = 0.6,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        image_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if train_fraction <= 0 or val_fraction < 0 or train_fraction + val_fraction >= 1:
            raise ValueError(
                f"train_fraction {train_fraction} and val_fraction {val_fraction} must leave a part to "
                "each of train and test"
            )
        self.path, self.bands, self.split_files = Path(path).expanduser(), _band_numbers(bands), splits
        self.fractions, self.split_seed = (train_fraction, val_fraction), split_seed
        self.image_size = image_size

    def load_splits(self) -> Splits:
        root = self._root()
        paths, label, names = list_classes(root)
        unknown = [name for name in names if name not in CLASSES]
        if unknown:
            raise ValueError(
                f"{root / unknown[0]} is no class of EuroSAT; its classes are {', '.join(CLASSES)}"
            )
        suffixes = (".jpg", ".jpeg", ".png") if self.bands is None else (".tif", ".tiff")
        chosen = np.asarray([Path(path).suffix.lower() in suffixes for path in paths])
        if not chosen.any():
            other = "[B04, B03, B02]" if self.bands is None else "rgb"
            raise FileNotFoundError(
                f"{root} has no images {', '.join(suffixes)}; for the others set bands to {other}"
            )
        paths = [path for path, wanted in zip(paths, chosen, strict=True) if wanted]
        label = label[chosen]
        rows = self._rows(paths, label, str(root))
        files = [str(root / path) for path in paths]
        return split_by_rows(self._source(files), label, rows, names, str(root), paths=paths)

    def _root(self) -> Path:
        for name in _FOLDERS:
            if any((self.path / name / c).is_dir() for c in CLASSES):
                return self.path / name
        raise FileNotFoundError(
            f"no EuroSAT in {self.path}: there is no folder {CLASSES[0]} in it, nor in "
            f"{', '.join(_FOLDERS[1:])}"
        )

    def _source(self, files: Sequence[str]) -> ImageSource:
        if self.bands is None:
            return FileSource(files, 3, self.image_size, "squash")
        return _BandSource(files, self.bands, self.image_size)

    def _rows(self, paths: Sequence[str], label: np.ndarray, source: str) -> dict[str, np.ndarray]:
        lists = {name: self.path / file for name, file in (self.split_files or {}).items()}
        usual = {name: self.path / f"eurosat-{name}.txt" for name in SPLIT_NAMES}
        if not lists and usual["train"].is_file():
            lists = {name: file for name, file in usual.items() if file.is_file()}
        if lists:
            images = [f"{Path(path).stem}.jpg" for path in paths]
            return split_rows(MultiLabelTable(source, images, label[:, None], []), lists)
        rng = np.random.default_rng(self.split_seed)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLIT_NAMES}
        for c in np.unique(label):
            members = rng.permutation(np.flatnonzero(label == c))
            ends = np.round(np.cumsum(self.fractions) * len(members)).astype(int)
            for name, part in zip(SPLIT_NAMES, np.split(members, ends), strict=True):
                parts[name].append(part)
        rows = {name: np.sort(np.concatenate(part)) for name, part in parts.items()}
        return {name: at for name, at in rows.items() if len(at)}


class _BandSource(RasterSource):
    """Rasters that show their true colours to people, where the bands of these are read."""

    def subset(self, rows: np.ndarray) -> _BandSource:
        return _BandSource(self.paths[rows].tolist(), self.bands, self.image_size)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        if self.bands == _RGB or not set(_RGB) <= set(self.bands):
            return super().pictures(indices)
        shown = copy(self)
        shown.bands, shown.channels = _RGB, len(_RGB)
        return shown.pictures(indices)


def _band_numbers(bands: str | Sequence[str]) -> list[int] | None:
    """Numbers of bands in the GeoTIFFs, from 1; ``None`` = the JPEGs."""
    if isinstance(bands, str):
        if bands not in ("rgb", "all"):
            raise ValueError(f"bands must be rgb, all, or a list such as [B04, B08]; got '{bands}'")
        return None if bands == "rgb" else list(range(1, len(BANDS) + 1))
    unknown = [band for band in bands if band not in BANDS]
    if unknown or not bands or len(set(bands)) != len(bands):
        raise ValueError(f"bands must name some of {', '.join(BANDS)}, each once; got {list(bands)}")
    return [BANDS.index(band) + 1 for band in bands]
