"""EuroSAT: the real RGB subset, 13-band GeoTIFFs, lists, bad folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_nrml.data import EuroSATDataModule, NoiseConfig
from lightning_nrml.data.eurosat import BANDS, CLASSES
from lightning_nrml.data.sources import BadImageError, MemorySource

NO_RASTERIO = "rasterio is not installed: pip install 'lightning-nrml[rs]'"


def module(folder: Path, kept: Path, **kwargs: Any) -> EuroSATDataModule:
    return EuroSATDataModule(str(folder), statistics_folder=str(kept), **kwargs)


def make_tifs(root: Path, bands: int = 13, classes: tuple[str, ...] = CLASSES[:3]) -> None:
    """Ten 64 x 64 images a class; band b of image i is 100 * b + i everywhere."""
    rasterio = pytest.importorskip("rasterio", reason=NO_RASTERIO)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.full((bands, 64, 64), i, dtype=np.uint16)
            pixels += 100 * np.arange(1, bands + 1, dtype=np.uint16)[:, None, None]
            with rasterio.open(
                root / name / f"{name}_{i}.tif",
                "w",
                driver="GTiff",
                count=bands,
                height=64,
                width=64,
                dtype="uint16",
            ) as file:
                file.write(pixels)


def test_real_rgb(shared_data, tmp_path) -> None:
    folder = shared_data("eurosat_rgb_subset")
    data = module(
        folder, tmp_path, image_size=32, batch_size=40, m_per_class=4, noise=NoiseConfig("symmetric", 0.3)
    )
    assert (data.num_classes, data.in_channels, data.class_names) == (10, 3, list(CLASSES))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 1200,
        "val": 400,
        "test": 400,
    }
    for name, count in (("train", 120), ("val", 40), ("test", 40)):
        split = getattr(data.splits, name)
        label = split.label if split.clean_label is None else split.clean_label
        assert np.bincount(label).tolist() == [count] * 10
        assert all(path.startswith(CLASSES[c]) for path, c in zip(split.paths, label, strict=True))
    assert 0.2 < data.train_is_noise.float().mean() < 0.4
    again, other = module(folder, tmp_path), module(folder, tmp_path, split_seed=1)
    assert again.train_paths == data.train_paths != other.train_paths
    with Image.open(folder / "2750" / data.train_paths[7]) as image:
        want = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    assert torch.equal(again.splits.train.images.get([7])[0], want)
    batch = data.apply_views(next(iter(data.train_dataloader())), training=True)
    assert batch["image"].shape == (40, 3, 32, 32)
    mean, std = data.statistics
    assert all(0.2 < m < 0.6 for m in mean)
    assert all(0.03 < s < 0.3 for s in std)


def test_thirteen_bands(tmp_path) -> None:
    make_tifs(tmp_path / "ds/images/remote_sensing/otherDatasets/sentinel_2/tif")
    data = module(tmp_path, tmp_path / "kept", bands="all", batch_size=4)
    assert data.in_channels == 13
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 18, "val": 6, "test": 6}
    images, paths = data.splits.train.images.get([5]), data.train_paths
    number = int(paths[5].rsplit("_", 1)[1].removesuffix(".tif"))
    assert images.dtype is torch.float32
    assert images[0, :, 3, 3].tolist() == [100 * b + number for b in range(1, 14)]
    some = module(tmp_path, tmp_path / "kept", bands=["B8A", "B04"], image_size=8)
    assert (BANDS.index("B8A"), BANDS.index("B04")) == (12, 3), "B8A comes last in the files"
    assert some.splits.train.images.get([5])[0, :, 0, 0].tolist() == [1300 + number, 400 + number]
    train = [int(path.rsplit("_", 1)[1].removesuffix(".tif")) for path in paths]
    assert some.statistics[0] == pytest.approx([1300 + np.mean(train), 400 + np.mean(train)])


def test_lists(tmp_path) -> None:
    make_tifs(tmp_path / "EuroSAT_MS")
    names = [f"{c}_{i}.jpg" for c in CLASSES[:3] for i in range(10)]
    lists = {"train": names[::2], "val": names[1::4], "test": names[3::4]}
    for name, lines in lists.items():
        (tmp_path / f"eurosat-{name}.txt").write_text("\n".join(lines))
    data = module(tmp_path, tmp_path / "kept", bands="all")
    assert [Path(p).stem + ".jpg" for p in data.train_paths] == names[::2]
    assert len(data.splits.test) == len(lists["test"])
    (tmp_path / "mine.txt").write_text(f"{names[1]}\n{names[2]}\n")
    with pytest.raises(ValueError, match=r"line 2: 'AnnualCrop_2\.jpg' is in the train split already"):
        module(
            tmp_path,
            tmp_path / "kept",
            bands="all",
            splits={"train": "eurosat-train.txt", "test": "mine.txt"},
        ).splits


def test_bad_input_is_named(tmp_path) -> None:
    make_tifs(tmp_path / "tif", bands=3)
    with pytest.raises(BadImageError, match=r"_\d.tif has 3 bands, but bands \[1, 2, 3, 4"):
        module(tmp_path, tmp_path / "kept", bands="all").splits.train.images.get([0])
    for kwargs, error, words in (
        ({"bands": "s2"}, ValueError, "bands must be rgb, all, or a list"),
        ({"bands": ["B4"]}, ValueError, "bands must name some of B01, B02"),
        ({"bands": ["B04", "B04"]}, ValueError, "each once"),
        ({"train_fraction": 0.8}, ValueError, "must leave a part"),
        ({}, FileNotFoundError, r"has no images .jpg.*set bands to \[B04, B03, B02\]"),
    ):
        with pytest.raises(error, match=words):
            module(tmp_path, tmp_path / "kept", **kwargs).splits
    (tmp_path / "tif" / "Desert").mkdir()
    (tmp_path / "tif" / "Desert" / "Desert_1.tif").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Desert is no class of EuroSAT; its classes are AnnualCrop"):
        module(tmp_path, tmp_path / "kept", bands="all").splits
    with pytest.raises(FileNotFoundError, match=r"no EuroSAT in .*empty: there is no folder AnnualCrop"):
        module(tmp_path / "empty", tmp_path / "kept").splits


@pytest.mark.parametrize("bands", ["all", ["B02", "B03", "B04", "B08"], ["B08", "B03"]])
@pytest.mark.parametrize("cache", [True, False])
def test_pictures_show_red_green_blue(tmp_path, bands, cache) -> None:
    """Ramps as bright as the number of the band is large would all look the same: each has its own course."""
    make_tifs(tmp_path)
    rasterio = pytest.importorskip("rasterio", reason=NO_RASTERIO)
    pixels = np.stack([np.roll(np.arange(4096), 300 * b).reshape(64, 64) for b in range(13)]).astype(
        np.uint16
    )
    for file in tmp_path.rglob("*.tif"):
        with rasterio.open(file, "r+") as raster:
            raster.write(pixels)
    data = module(tmp_path, tmp_path / "kept", bands=bands, batch_size=4, cache=cache)
    data.setup("fit")
    images = data.splits.train.subset(np.asarray([3, 1])).images
    shown = ["B04", "B03", "B02"] if len(bands) > 2 else bands
    want = MemorySource(torch.from_numpy(pixels[[BANDS.index(band) for band in shown]])[None].float())
    assert torch.equal(images.pictures([1])[:, :3], want.pictures([0]))
