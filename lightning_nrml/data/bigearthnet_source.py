"""Patches of BigEarthNet as ``(bands, 120, 120)`` float32, from GeoTIFF folders or from an LMDB."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrml.data.bigearthnet_classes import BAND_SETS, S1_SIDES, SIDES
from lightning_nrml.data.bigearthnet_index import V1_FOLDERS, V2_FOLDERS
from lightning_nrml.data.extras import import_extra
from lightning_nrml.data.raster import open_raster
from lightning_nrml.data.sources import BadImageError, ImageSource

SIDE = 120
Resample = Literal["nearest", "bilinear", "bicubic"]
#: open databases of this process by path
_OPEN: dict[str, Any] = {}


def _close_all() -> None:
    for environment in _OPEN.values():
        environment.close()
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)  # a loader's worker opens its own


class PatchStore(ABC):
    """Where planes lie: one name per patch and sensor, one plane per band."""

    @abstractmethod
    def read(self, sensor: str, name: str, bands: Sequence[str]) -> list[np.ndarray]:
        """A plane ``(H, W)`` in its own type and size for each band.

        Raises:
            BadImageError: it is missing, cannot be read, or has pixels without data.
        """

    @abstractmethod
    def where(self, sensor: str, name: str, band: str = "") -> str:
        """How to call a patch, or a plane of it, in a message."""

    @abstractmethod
    def files(self, sensor: str, names: np.ndarray, bands: Sequence[str]) -> Iterable[str]:
        """The files that these planes of patches are read from."""

    @abstractmethod
    def absent(self, sensor: str, names: np.ndarray) -> np.ndarray:
        """``(len(names),)`` bool, which patches are not there at all; opens no image."""


class GeoTiffStore(PatchStore):
    """Folders as unpacked: a GeoTIFF per band.

    v1: ``BigEarthNet-v1.0/<patch>/<patch>_<band>.tif``; v2: ``BigEarthNet-S2/<tile>/<patch>/...``.

    Args:
        root: folder that holds these folders.
        version: 1 or 2.
    """

    def __init__(self, root: Path, version: int) -> None:
        self.version = version
        folders = V1_FOLDERS if version == 1 else V2_FOLDERS
        self.folders = {sensor: str(root / name) for sensor, name in folders.items()}

    def parent(self, sensor: str, name: str) -> str:
        """Folder in which the patch's folder lies (strings: half a million paths take seconds as objects)."""
        if self.version == 1:
            return self.folders[sensor]
        # <tile product>_<column>_<row>; Sentinel-1 names have the tile in between
        return f"{self.folders[sensor]}/{name.rsplit('_', 2 if sensor == 's2' else 3)[0]}"

    def where(self, sensor: str, name: str, band: str = "") -> str:
        folder = f"{self.parent(sensor, name)}/{name}"
        return f"{folder}/{name}_{band}.tif" if band else folder

    def files(self, sensor: str, names: np.ndarray, bands: Sequence[str]) -> Iterable[str]:
        return (self.where(sensor, raw.decode(), band) for raw in names.tolist() for band in bands)

    def absent(self, sensor: str, names: np.ndarray) -> np.ndarray:
        rows_of: dict[str, list[int]] = {}
        for row, raw in enumerate(names.tolist()):
            rows_of.setdefault(self.parent(sensor, raw.decode()), []).append(row)
        lost = np.ones(len(names), dtype=bool)
        for parent, rows in rows_of.items():  # one listing per folder instead of a look-up per patch
            there = {name.encode() for name in os.listdir(parent)} if os.path.isdir(parent) else set()
            lost[rows] = [raw not in there for raw in names[rows].tolist()]
        return lost

    def read(self, sensor: str, name: str, bands: Sequence[str]) -> list[np.ndarray]:
        return [self._plane(self.where(sensor, name, band)) for band in bands]

    @staticmethod
    def _plane(path: str) -> np.ndarray:
        rasterio = import_extra("rasterio", path)
        if not os.path.isfile(path):
            raise BadImageError(
                f"band file {path} is missing; mend or remove the patch, or set on_bad_image: skip"
            )
        try:
            with open_raster(path) as file:
                plane: np.ndarray = file.read(1)
                nodata = file.nodatavals[0]
        except (rasterio.errors.RasterioError, OSError) as error:
            raise BadImageError(
                f"cannot read {path} ({type(error).__name__}: {error}); mend or remove it, or set "
                "on_bad_image: skip"
            ) from error
        if nodata is not None and np.isfinite(nodata) and (plane == nodata).any():
            bad = int((plane == nodata).sum())
            raise BadImageError(
                f"{path}: {bad} of {plane.size} pixels are nodata ({nodata}); fill or remove it, or set "
                "on_bad_image: skip"
            )
        return plane


class LMDBStore(PatchStore):
    """An LMDB whose keys are patch names and whose values are safetensors: band name -> plane.

    This is what the makers of v2 train from. It is opened in each process when it is first read there.

    Args:
        path: folder (or file) of the LMDB.

    Raises:
        FileNotFoundError: there is nothing.
        ImportError: lmdb is not installed.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no LMDB {path}; check lmdb")
        self.path = path
        import_extra("lmdb", path)

    @property
    def environment(self) -> Any:
        """The open database; a process may open one only once, and must not go on with its parent's."""
        key = str(self.path.resolve())
        if key not in _OPEN:
            lmdb = import_extra("lmdb", self.path)
            folder = self.path.is_dir()
            try:
                _OPEN[key] = lmdb.open(key, subdir=folder, readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise BadImageError(f"cannot open the LMDB {self.path} ({error}); check lmdb") from error
        return _OPEN[key]

    def where(self, sensor: str, name: str, band: str = "") -> str:
        return f"{f'band {band} of ' if band else ''}patch {name} in {self.path}"

    def files(self, sensor: str, names: np.ndarray, bands: Sequence[str]) -> Iterable[str]:
        return [str(self.path / "data.mdb" if self.path.is_dir() else self.path)]

    def absent(self, sensor: str, names: np.ndarray) -> np.ndarray:
        lost = np.zeros(len(names), dtype=bool)
        with self.environment.begin() as read, read.cursor() as cursor:
            for row in np.argsort(names, kind="stable"):  # in the order of the database
                lost[row] = not cursor.set_key(bytes(names[row]))
        return lost

    def read(self, sensor: str, name: str, bands: Sequence[str]) -> list[np.ndarray]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        with self.environment.begin() as read:
            value = read.get(name.encode())
        if value is None:
            raise BadImageError(
                f"there is no {self.where(sensor, name)}; set on_bad_image: skip to go without"
            )
        try:
            planes = load(value)
        except (SafetensorError, ValueError, KeyError) as error:
            raise BadImageError(
                f"{self.where(sensor, name)} is no safetensors ({error}); pickles are not read, for they "
                "can run code: convert them"
            ) from error
        lost = [band for band in bands if band not in planes]
        if lost:
            raise BadImageError(
                f"{self.where(sensor, name, lost[0])} is missing; it has {', '.join(sorted(planes))}"
            )
        return [planes[band].reshape(planes[band].shape[-2:]) for band in bands]


class PatchSource(ImageSource):
    """Patches as float32 ``(bands, 120, 120)``: Sentinel-2 in counts, Sentinel-1 in dB.

    Bands of 20 and 60 m are resampled to the pixels of 10 m, half-pixel centres aligned.

    Args:
        store: where planes lie.
        names: names of the patches by sensor, ``(N,)`` bytes each; a sensor whose bands are read is needed.
        bands: names of bands, in the order of the channels.
        resample: how.
    """

    dtype = torch.float32

    def __init__(
        self,
        store: PatchStore,
        names: dict[str, np.ndarray],
        bands: Sequence[str],
        resample: Resample = "bilinear",
    ) -> None:
        self.store, self.names, self.bands, self.resample = store, names, tuple(bands), resample
        self.channels, self.size = len(self.bands), (SIDE, SIDE)
        #: bands to read by sensor, and the channels where they go
        self.plan = {
            sensor: [c for c, band in enumerate(self.bands) if (band in S1_SIDES) == (sensor == "s1")]
            for sensor in ("s2", "s1")
        }
        self.plan = {sensor: channels for sensor, channels in self.plan.items() if channels}
        #: the sensor whose patch is not there, by row, as far as :meth:`missing` has found out
        self._lost: dict[int, str] = {}

    def __len__(self) -> int:
        return len(next(iter(self.names.values())))

    def name(self, row: int) -> str:
        sensor = self._lost.get(row, next(iter(self.plan)))
        return self.store.where(sensor, self.names[sensor][row].decode())

    def reading(self) -> tuple[object, ...]:
        names = [hashlib.sha256(self.names[s].tobytes()).hexdigest() for s in self.plan]
        return "PatchSource", self.bands, self.resample, names

    def files(self) -> Iterable[str]:
        for sensor, channels in self.plan.items():
            yield from self.store.files(sensor, self.names[sensor], [self.bands[c] for c in channels])

    def missing(self) -> list[int]:
        self._lost = {}
        for sensor in self.plan:
            for row in np.flatnonzero(self.store.absent(sensor, self.names[sensor])).tolist():
                self._lost.setdefault(row, sensor)
        return sorted(self._lost)

    def subset(self, rows: np.ndarray) -> PatchSource:
        names = {sensor: name[rows] for sensor, name in self.names.items()}
        return PatchSource(self.store, names, self.bands, self.resample)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """In true colours where their bands are read."""
        rgb = BAND_SETS["rgb"]
        if self.bands == rgb or not set(rgb) <= set(self.bands):
            return super().pictures(indices)
        return PatchSource(self.store, self.names, rgb, self.resample).pictures(indices)

    def get(self, indices: Sequence[int]) -> Tensor:
        images = torch.empty((len(indices), self.channels, SIDE, SIDE))
        for image, row in zip(images, indices, strict=True):
            self._fill(image, row)
        return images

    def _fill(self, image: Tensor, row: int) -> None:
        """Write one patch into ``image`` ``(bands, 120, 120)``."""
        by_side: dict[int, tuple[list[int], list[np.ndarray]]] = {}
        for sensor, channels in self.plan.items():
            name = self.names[sensor][row].decode()
            planes = self.store.read(sensor, name, [self.bands[c] for c in channels])
            for channel, plane in zip(channels, planes, strict=True):
                self._check(sensor, name, self.bands[channel], plane)
                to, found = by_side.setdefault(len(plane), ([], []))
                to.append(channel)
                found.append(plane.astype(np.float32))
        for side, (to, found) in by_side.items():
            stack = torch.from_numpy(np.stack(found))
            if side != SIDE:
                stack = F.interpolate(stack[None], (SIDE, SIDE), **self._interpolation())[0]
            image[to] = stack

    def _interpolation(self) -> dict[str, Any]:
        if self.resample == "nearest":
            return {"mode": "nearest-exact"}
        return {"mode": self.resample, "align_corners": False}

    def _check(self, sensor: str, name: str, band: str, plane: np.ndarray) -> None:
        where = self.store.where(sensor, name, band)
        if plane.shape != (SIDES[band], SIDES[band]):
            raise BadImageError(
                f"{where} is {' x '.join(map(str, plane.shape))}, but {band} has "
                f"{SIDES[band]} x {SIDES[band]} pixels"
            )
        if sensor == "s1" and plane.dtype.kind != "f":
            raise BadImageError(
                f"{where} is {plane.dtype}, but Sentinel-1 is in fractions of dB: keep it as float32"
            )
        if plane.dtype.kind == "f" and not np.isfinite(plane).all():
            bad = int((~np.isfinite(plane)).sum())
            raise BadImageError(
                f"{where}: {bad} of {plane.size} pixels are NaN or infinite; fill or remove it, or set "
                "on_bad_image: skip"
            )
