"""Indexing BigEarthNet at full size: memory per patch, no file opened twice, no image opened at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bigearthnet_layout import NO_LMDB, v1_names, v2_names, write_json, write_lmdb, write_metadata

from lightning_nrml.data import BigEarthNetDataModule, NoiseConfig

#: of a process that indexes: seconds, and bytes at the peak above what it had after its imports
_MEASURE = """
import json, resource, sys, time
import pandas, pyarrow.parquet
from lightning_nrml.data import BigEarthNetDataModule, NoiseConfig
from lightning_nrml.modules import MultiLabel
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
data = BigEarthNetDataModule(**json.loads(sys.argv[1]), noise=NoiseConfig("mixed", 0.2))
data.prepare_data()
data.setup("fit")
sizes = [len(split) for _, split in data.splits.items()]
seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
print(json.dumps({**seconds, "bytes": peak() - before, "sizes": sizes}))
"""


def measure(**arguments: object) -> dict:
    """In a process of its own."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", _MEASURE, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def folders(root: Path, s2: list[str]) -> None:
    """v2's empty patch folders."""
    for name in s2:
        (root / "BigEarthNet-S2" / name.rsplit("_", 2)[0] / name).mkdir(parents=True)


def test_the_index_opens_no_image_and_lists_each_folder_once(tmp_path, monkeypatch) -> None:
    s2, s1 = v2_names(3000)
    folders(tmp_path, s2)
    write_metadata(tmp_path / "metadata.parquet", s2, s1)
    listed: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or listdir(path))
    monkeypatch.setitem(sys.modules, "rasterio", None)  # opening any GeoTIFF would fail
    data = BigEarthNetDataModule(str(tmp_path), noise=NoiseConfig("mixed", 0.2))
    assert [len(split) for _, split in data.splits.items()] == [1800, 600, 600]
    assert len(listed) == 300, "100 tiles in each of three splits"
    assert data.train_clean_label.sum() == 2 * 1800
    # what a loader's worker is given: names and labels, no Python object per patch
    source = data.splits.train.images
    assert all(name.dtype.kind == "S" and name.itemsize <= 64 for name in source.names.values())


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Path]:
    """Its million files are not left for pytest to tidy up in some later run."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", ["v2 folders", "v2 lmdb", "v1 json"])
def test_600k_patches(layout, archive, record_property) -> None:
    """Measured, not asserted, is the time; memory must stay below 2.5 kB per patch."""
    rows = 600_000
    arguments: dict[str, object] = {"path": str(archive), "statistics_folder": str(archive / "kept")}
    if layout == "v1 json":
        s2, s1 = v1_names(rows)
        write_json(archive, s2, [])
        cuts = {"train": s2[: rows // 2], "val": s2[rows // 2 : 3 * rows // 4], "test": s2[3 * rows // 4 :]}
        for name, lines in cuts.items():
            (archive / f"{name}.csv").write_text("\n".join(lines))
        arguments["nomenclature"] = 43
    else:
        s2, s1 = v2_names(rows)
        write_metadata(archive / "metadata.parquet", s2, s1)
        if layout == "v2 lmdb":
            pytest.importorskip("lmdb", reason=NO_LMDB)
            write_lmdb(archive / "x.lmdb", dict.fromkeys([*s2, *s1], b"x"))
            arguments |= {"lmdb": "x.lmdb", "bands": "both"}
        else:
            folders(archive, s2)
    for turn in ("first", "again"):
        found = measure(**arguments)
        record_property(turn, found)
        print(f"\n{layout}, {turn}: {found}")
        assert sum(found["sizes"]) == rows
        assert found["bytes"] < 2500 * rows
    assert np.diff(found["sizes"])[1] == 0
