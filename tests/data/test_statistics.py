"""Statistics kept on disk hold for the very pixels that are read; which files are read as pictures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bigearthnet_layout import NO_LMDB, NO_RASTERIO, make_v2, planes, write_lmdb
from bigearthnet_layout import module as bigearthnet
from PIL import Image

from lightning_nrml.data import bigearthnet_source
from lightning_nrml.data.raster import RasterSource, cached_statistics
from lightning_nrml.data.sources import BadImageError, FileSource, MemorySource, cached

sys.path.insert(0, str(Path(__file__).parent))
from test_deepglobe import make as make_deepglobe
from test_deepglobe import module as deepglobe
from test_multilabel_rs import make, module, raster


def rasters(folder: Path, bands: int = 5, **kwargs) -> Path:
    """The set of ``make`` with uint16 GeoTIFFs; band b holds ``1000 * b`` and a little more."""
    make(folder)
    for i, old in enumerate(sorted((folder / "Images").rglob("*.png"))):
        level = 1000 * np.arange(1, bands + 1)[:, None, None] + np.arange(16).reshape(1, 4, 4) + i
        raster(old.with_suffix(".tif"), level.astype(np.uint16), **kwargs)
        old.unlink()
    return folder


def touched(path: Path) -> None:
    """As if it had been written much later."""
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**10))


@pytest.mark.parametrize("cache", [True, False])
def test_statistics_are_those_of_the_bands_in_their_order(tmp_path, cache):
    rasters(tmp_path)
    for bands in ([1, 2], [4, 5], [2, 1]):
        data = module(tmp_path, bands=bands, image_size=None, cache=cache)
        data.setup("fit")  # which keeps the images in memory
        assert isinstance(data.splits.train.images, MemorySource) is cache
        assert np.round(np.array(data.statistics[0]) / 1000).tolist() == bands
    assert len(list((tmp_path / "cache").glob("bands_*.json"))) == 3
    file = sorted((tmp_path / "Images").rglob("*.tif"))[0]
    before = module(tmp_path, bands=[1], image_size=None).statistics
    raster(file, np.full((5, 4, 4), 60000, dtype=np.uint16))
    touched(file)
    assert module(tmp_path, bands=[1], image_size=None).statistics != before


def test_statistics_of_a_source_without_files_are_not_kept(tmp_path):
    for level in (1.0, 2.0):
        assert cached_statistics(MemorySource(torch.full((2, 1, 3, 3), level)), tmp_path)[0] == (level,)
    assert not list(tmp_path.iterdir())
    folder = tmp_path / "files"
    folder.mkdir()
    Image.new("L", (4, 4), 51).save(folder / "a.png")
    both = [FileSource([folder / name], 3, 4) for name in ("a.png", "lost.png")]
    assert cached_statistics(cached(both[0]), tmp_path)[0] == pytest.approx([0.2] * 3)
    with pytest.raises(BadImageError, match=r"none of the 1 images can be read, such as .*lost\.png"):
        cached_statistics(both[1], tmp_path)
    # other views of the same file have another key
    assert both[0].reading() != FileSource([folder / "a.png"], 3, 5).reading()
    assert both[0].reading() != FileSource([folder / "a.png"], 1, 4).reading()
    assert both[0].reading() != FileSource([folder / "a.png"], 3, 4, "squash").reading()


def test_damaged_statistics_are_made_anew(tmp_path):
    rasters(tmp_path)
    expected = cached_statistics(module(tmp_path).splits.train.images, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    for content in ("", "{", "[]", "{}"):
        kept.write_text(content)
        assert cached_statistics(module(tmp_path).splits.train.images, tmp_path / "kept") == expected
        assert len(kept.read_text()) > 2


def test_statistics_of_patches_notice_pixels_bands_and_resampling(tmp_path):
    pytest.importorskip("rasterio", reason=NO_RASTERIO)
    s2, _ = make_v2(tmp_path)

    def mean(bands, **kwargs):
        data = bigearthnet(tmp_path, tmp_path / "cache", bands=bands, band_statistics="train", **kwargs)
        data.setup("fit")
        return np.array(data.statistics)

    first = mean(["B02", "B11"])
    assert first[:, ::-1] == pytest.approx(mean(["B11", "B02"]))
    assert first[1, 1] != mean(["B02", "B11"], resample="nearest")[1, 1]
    (file,) = (tmp_path / "BigEarthNet-S2").rglob(f"{s2[0]}_B02.tif")
    raster(file, 2 * planes(0, ["B02"])["B02"][None])
    touched(file)
    second = mean(["B02", "B11"])
    assert second[0, 0] > first[0, 0]
    assert second[:, 1] == pytest.approx(first[:, 1])


def test_statistics_of_an_lmdb_notice_another_file(tmp_path):
    pytest.importorskip("lmdb", reason=NO_LMDB)
    from safetensors.numpy import save

    s2, _ = make_v2(tmp_path)
    for i, scale in enumerate((1, 3)):
        values = {name: save({"B02": scale * planes(k, ["B02"])["B02"]}) for k, name in enumerate(s2)}
        write_lmdb(tmp_path / f"{i}.lmdb", values)
    want = np.mean([planes(k, ["B02"])["B02"] for k in range(3)])
    for i, scale in enumerate((1, 3)):
        data = bigearthnet(
            tmp_path, tmp_path / "cache", bands=["B02"], band_statistics="train", lmdb=f"{i}.lmdb"
        )
        assert data.statistics[0][0] == pytest.approx(scale * want, rel=1e-5)
    bigearthnet_source._close_all()
    files = list(data.splits.train.images.files())
    assert len(files) == 1
    assert Path(files[0]).is_file()


def test_tiles_of_another_place_have_statistics_of_their_own(tmp_path):
    make_deepglobe(tmp_path)
    data = [deepglobe(tmp_path, tiles_per_image=count) for count in (None, 3)]
    one, two = (d.splits.train.images for d in data)
    assert set(one.files()) >= set(two.files())
    assert one.reading() != two.reading()
    assert one.reading() == deepglobe(tmp_path, tiles_per_image=None).splits.train.images.reading()


@pytest.mark.parametrize("bands", [1, 2, 4, 13])
def test_tiffs_of_other_than_three_bands_are_rasters(tmp_path, bands, caplog):
    rasters(tmp_path, 1)
    for i, file in enumerate(sorted((tmp_path / "Images").rglob("*.tif"))):
        raster(file, np.full((bands, 4, 4), i, dtype=np.uint8))
    data = module(tmp_path, image_size=None)
    assert data.in_channels == bands
    assert isinstance(data.splits.train.images, RasterSource)
    assert not [record for record in caplog.records if record.name.startswith("PIL")], "of many bands"


def test_nodata_and_masks_of_8_bit_tiffs_are_refused(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason=NO_RASTERIO)
    rasters(tmp_path, 1)
    files = sorted((tmp_path / "Images").rglob("*.tif"))
    for file in files:
        raster(file, np.full((3, 4, 4), 7, dtype=np.uint8))
    assert isinstance(module(tmp_path, image_size=None).splits.train.images, FileSource)
    for file in files:
        pixels = np.full((3, 4, 4), 7, dtype=np.uint8)
        pixels[1, :2] = 0
        raster(file, pixels, nodata=0)
    with pytest.raises(BadImageError, match=r"band 2: 8 of 16 pixels are .*nodata \(0"):
        module(tmp_path, image_size=None).splits.train.images.get([0])
    raster(tmp_path / "mask.tif", np.full((3, 4, 4), 7, dtype=np.uint8))
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(tmp_path / "mask.tif", "r+") as file,
    ):
        hidden = np.full((4, 4), 255, dtype=np.uint8)
        hidden[0, :3] = 0
        file.write_mask(hidden)
    with pytest.raises(BadImageError, match=r"mask.tif, band 1: 3 of 16 pixels are .* masked"):
        RasterSource([tmp_path / "mask.tif"]).get([0])
    # transparency is none: such pixels have values
    raster(tmp_path / "alpha.tif", np.full((4, 4, 4), 0, dtype=np.uint8), photometric="RGB", alpha="YES")
    assert RasterSource([tmp_path / "alpha.tif"]).get([0]).shape == (1, 4, 4, 4)


def test_deep_pixels_are_not_clipped(tmp_path):
    """Pillow makes them white; of 16-bit grey PNGs, as of RGB ones, the upper 8 bits are taken."""
    deep = np.linspace(500, 60000, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "grey.png")
    got = FileSource([tmp_path / "grey.png"], 1).get([0])[0, 0]
    assert got.equal(torch.from_numpy((deep >> 8).astype(np.uint8)))
    assert FileSource([tmp_path / "grey.png"], 3).get([0])[0, 2].equal(got)
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray((deep / 60000).astype(np.float32)).save(tmp_path / "float.tif")
    for name, mode in (("deep.tif", "I;16"), ("float.tif", "F")):
        with pytest.raises(BadImageError, match=rf"{name}.*pixels of mode {mode} do not fit into 8-bit"):
            FileSource([tmp_path / name]).get([0])
    four = np.full((4, 8, 8), 9, dtype=np.uint8)
    raster(tmp_path / "four.tif", four, photometric="RGB", alpha="UNSPECIFIED")
    with pytest.raises(BadImageError, match=r"four.tif.*4 bands do not fit"):
        FileSource([tmp_path / "four.tif"]).get([0])
    raster(tmp_path / "rgba.tif", four, photometric="RGB", alpha="YES")
    assert FileSource([tmp_path / "rgba.tif"]).get([0]).unique().tolist() == [9]
