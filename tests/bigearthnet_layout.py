"""Small BigEarthNet archives in the real layouts, and large ones without pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_nrml.data import BigEarthNetDataModule
from lightning_nrml.data.bigearthnet_classes import CLASSES_19, CLASSES_43, S1_SIDES, S2_SIDES, SIDES

NO_RASTERIO = "rasterio is not installed: pip install 'lightning-nrml[rs]'"
NO_LMDB = "lmdb is not installed: pip install 'lightning-nrml[rs]'"


def module(folder: Path, kept: Path, **kwargs: Any) -> BigEarthNetDataModule:
    """A datamodule of an archive that keeps its tables in ``kept``."""
    return BigEarthNetDataModule(str(folder), statistics_folder=str(kept), batch_size=2, **kwargs)


def v2_names(rows: int) -> tuple[list[str], list[str]]:
    """Sentinel-2 and Sentinel-1 names as in v2, a hundred tiles."""
    s2, s1 = [], []
    for i in range(rows):
        tile, place = f"{i % 100:02d}", f"{i // 100 % 100}_{i // 10000}"
        s2.append(f"S2A_MSIL2A_201706{tile}T101031_N9999_R022_T33UUP_{place}")
        s1.append(f"S1A_IW_GRDH_1SDV_201706{tile}T165043_33UUP_{place}")
    return s2, s1


def v1_names(rows: int) -> tuple[list[str], list[str]]:
    """The same as in v1."""
    s2 = [f"S2A_MSIL2A_20170613T101031_{i % 1000}_{i // 1000}" for i in range(rows)]
    s1 = [f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{i % 1000}_{i // 1000}" for i in range(rows)]
    return s2, s1


def planes(seed: int, bands: Sequence[str]) -> dict[str, np.ndarray]:
    """Random planes of the right sizes and types."""
    rng = np.random.default_rng(seed)
    made = {}
    for band in bands:
        shape = (SIDES[band], SIDES[band])
        if band in S1_SIDES:
            made[band] = rng.normal(-12, 4, shape).astype(np.float32)
        else:
            made[band] = rng.integers(1, 9000, shape, dtype=np.uint16)
    return made


def write_tif(path: Path, plane: np.ndarray, **kwargs: object) -> None:
    """One band."""
    rasterio = pytest.importorskip("rasterio", reason=NO_RASTERIO)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = plane.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=height, width=width, dtype=plane.dtype, **kwargs
    ) as file:
        file.write(plane, 1)


def write_patch(folder: Path, name: str, made: dict[str, np.ndarray]) -> None:
    """``<folder>/<name>/<name>_<band>.tif`` for each plane."""
    for band, plane in made.items():
        write_tif(folder / name / f"{name}_{band}.tif", plane)


def write_metadata(path: Path, s2: list[str], s1: list[str], **columns: object) -> list[list[str]]:
    """v2's table: 60 % train, two labels a row (class i and i + 1 of row i); returns the label names."""
    rows = len(s2)
    labels = [[CLASSES_19[i % 19], CLASSES_19[(i + 1) % 19]] for i in range(rows)]
    split = np.repeat(["train", "validation", "test"], [rows - 2 * (rows // 5), rows // 5, rows // 5])
    frame = {"patch_id": s2, "s1_name": s1, "split": split.tolist(), "labels": labels, **columns}
    pq.write_table(pa.table(frame), path)
    return labels


def make_v2(root: Path, rows: int = 5) -> tuple[list[str], list[str]]:
    """A v2 archive with GeoTIFFs."""
    s2, s1 = v2_names(rows)
    for i in range(rows):
        tile = root / "BigEarthNet-S2" / s2[i].rsplit("_", 2)[0]
        write_patch(tile, s2[i], planes(i, list(S2_SIDES)))
        write_patch(
            root / "BigEarthNet-S1" / s1[i].rsplit("_", 3)[0], s1[i], planes(1000 + i, list(S1_SIDES))
        )
    write_metadata(root / "metadata.parquet", s2, s1)
    return s2, s1


def write_json(root: Path, s2: list[str], s1: list[str], step: int = 1) -> None:
    """v1's folders with their JSON files and no images; row i has class i * step of the 43."""
    for sensor, names in (("BigEarthNet-v1.0", s2), ("BigEarthNet-S1-v1.0", s1)):
        for i, name in enumerate(names):
            folder = root / sensor / name
            folder.mkdir(parents=True)
            content = {"labels": [CLASSES_43[i * step % 43]], "corresponding_s2_patch": s2[i]}
            (folder / f"{name}_labels_metadata.json").write_text(json.dumps(content))


def write_lmdb(path: Path, values: dict[str, bytes]) -> None:
    """Patch name -> bytes."""
    lmdb = pytest.importorskip("lmdb", reason=NO_LMDB)
    with lmdb.open(str(path), map_size=2**32) as environment, environment.begin(write=True) as write:
        for name in sorted(values):
            write.put(name.encode(), values[name])
