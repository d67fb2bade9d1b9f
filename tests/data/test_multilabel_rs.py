"""Multi-label remote-sensing data: layouts, rasters, statistics, noise on train only, every bad input."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lightning_nrml.data import MultiLabelRSDataModule, NoiseConfig
from lightning_nrml.data import raster as raster_module
from lightning_nrml.data.multilabel_noise import multilabel, multilabel_scores
from lightning_nrml.data.raster import RasterSource, band_statistics
from lightning_nrml.data.sources import BadImageError, MemorySource, cached

NO_RASTERIO = "rasterio is not installed: pip install 'lightning-nrml[rs]'"
NAMES = ["field", "trees", "water"]
COUNTS = {"train": 12, "val": 4, "test": 5}


def labels(n: int = 21) -> np.ndarray:
    return (np.random.default_rng(0).random((n, 3)) < 0.4).astype(int)


def make(folder: Path, suffix: str = ".png", table: str = "labels.csv", **changes: Any) -> Path:
    """21 images of 12 x 12 (some of 10 x 12) in two folders, a CSV table and three lists."""
    stems = [f"scene{i:02d}" for i in range(21)]
    for i, stem in enumerate(stems):
        pixels = np.full((12 if i % 5 else 10, 12, 3), 10 * i, dtype=np.uint8)
        file = folder / "Images" / ("a" if i % 2 else "b") / f"{stem}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    rows = {"image": stems, **dict(zip(NAMES, labels().T, strict=True)), **changes}
    pd.DataFrame(rows).to_csv(folder / table, index=False)
    start = 0
    for name, count in COUNTS.items():
        (folder / f"split_{name}.txt").write_text("\n".join(stems[start : start + count]) + "\n")
        start += count
    return folder


def module(folder: Path, **kwargs: Any) -> MultiLabelRSDataModule:
    given = {
        "table": "labels.csv",
        "image_size": 8,
        "statistics_folder": str(folder / "cache"),
        "batch_size": 4,
    }
    return MultiLabelRSDataModule(str(folder), **{**given, **kwargs})


def raster(path: Path, pixels: np.ndarray, **kwargs: Any) -> Path:
    rasterio = pytest.importorskip("rasterio", reason=NO_RASTERIO)
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=pixels.dtype, **kwargs
    ) as file:
        file.write(pixels)
    return path


def test_layout_with_lists(tmp_path):
    data = module(make(tmp_path))
    assert (data.num_classes, data.class_names, data.in_channels) == (3, NAMES, 3)
    assert {name: len(split) for name, split in data.splits.items()} == COUNTS
    assert data.train_label.tolist() == labels()[:12].tolist()
    assert data.splits.test.label.tolist() == labels()[16:].tolist()
    assert data.splits.train.images.get([3])[0, :, 0, 0].tolist() == [30, 30, 30]
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch.keys() == {"image", "label", "index"}
    assert batch["label"].tolist() == labels()[12:16].tolist()


def test_layout_with_a_split_column_parquet_and_chosen_labels(tmp_path):
    make(tmp_path)
    split = np.repeat(list(COUNTS), list(COUNTS.values()))
    paths = [f"{'a' if i % 2 else 'b'}/scene{i:02d}.png" for i in range(21)]
    frame = pd.DataFrame(
        {"note": "x", "file": paths, **dict(zip(NAMES, labels().T, strict=True)), "split": split}
    )
    frame.to_parquet(tmp_path / "t.parquet")
    data = module(tmp_path, table="t.parquet", image_column="file", label_columns=["water", "field"])
    assert data.class_names == ["water", "field"]
    assert data.train_label.tolist() == labels()[:12, [2, 0]].tolist()
    assert data.train_paths[1] == "a/scene01.png"


def test_ucmerced(shared_data, tmp_path):
    data = MultiLabelRSDataModule(
        str(shared_data("ucmerced_multilabel")),
        image_size=16,
        cache=False,
        statistics_folder=str(tmp_path),
        noise=NoiseConfig("mixed", 0.4, 1),
    )
    counts = [60, 430, 402, 543, 70, 63, 60, 61, 599, 62, 800, 177, 60, 60, 61, 605, 121]
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 1285,
        "val": 395,
        "test": 420,
    }
    assert data.train_clean_label.sum(0).tolist() == counts
    assert data.train_label.sum(0).tolist() == counts, "mixed noise keeps the sizes"
    assert data.class_names[0] == "airplane"
    assert data.class_names[16] == "water"
    assert data.noise_summary["rate_realised"] == pytest.approx(0.1546, abs=1e-4)
    assert data.noise_summary["rate_requested"] == 0.4
    held_out = np.concatenate([data.splits.val.label, data.splits.test.label])
    assert held_out.sum() == 7003 - sum(counts)
    odd = data.splits.train.images.get([0, 500])  # 44 images are not 256 x 256
    assert odd.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("kind", ["subtractive", "additive", "mixed", "uniform", "images"])
def test_noise_reaches_train_only_and_batches_carry_the_flips(tmp_path, kind):
    make(tmp_path)
    clean = labels()
    data = module(tmp_path, noise=NoiseConfig(kind, 0.5, 3), batch_size=6)
    assert data.train_clean_label.tolist() == clean[:12].tolist()
    assert data.splits.val.label.tolist() == clean[12:16].tolist()
    assert data.splits.test.label.tolist() == clean[16:].tolist()
    again = module(tmp_path, noise=NoiseConfig(kind, 0.5, 3), seed=9)
    assert torch.equal(again.train_label, data.train_label), "the seed of the sampler is another"
    data.setup("fit")
    flips = 0
    for batch in data.train_dataloader():
        assert torch.equal(batch["clean_label"], torch.as_tensor(clean)[batch["index"]])
        assert torch.equal(batch["is_noise"], batch["label"] != batch["clean_label"])
        flips += int(batch["is_noise"].sum())
    assert flips == int(data.train_is_noise.sum()) > 0
    if kind == "mixed":
        assert data.train_label.tolist() == multilabel(clean[:12], 0.5, 0.5, 3).label.tolist()


def test_noise_from_a_table(tmp_path):
    make(tmp_path)
    noisy = labels()
    noisy[2] = 1 - noisy[2]
    rows = {
        "image": [f"scene{i:02d}" for i in range(21)],
        **dict(zip(NAMES[::-1], noisy[:, ::-1].T, strict=True)),
    }
    frame = pd.DataFrame(rows)
    frame[::-1].to_csv(tmp_path / "noisy.csv", index=False)  # other orders of rows and columns
    data = module(tmp_path, noise=str(tmp_path / "noisy.csv"))
    assert (data.train_is_noise, data.num_changed_labels) == (None, 3)  # nothing says which labels are true
    frame.assign(clean_known=True)[::-1].to_csv(tmp_path / "noisy.csv", index=False)
    data = module(tmp_path, noise=str(tmp_path / "noisy.csv"))
    assert data.train_is_noise.nonzero()[:, 0].tolist() == [2, 2, 2]
    assert data.train_label.tolist() == noisy[:12].tolist()
    frame.drop(4).to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(ValueError, match="no row for 1 of 12 train images, the first is 'scene04'"):
        module(tmp_path, noise=str(tmp_path / "short.csv")).num_classes
    next((tmp_path / "Images").rglob("scene04.*")).unlink()  # an image that is left out needs no row
    data = module(tmp_path, noise=str(tmp_path / "short.csv"), on_bad_image="skip")
    with pytest.warns(UserWarning, match="left out 1 missing"):
        label = data.train_label
    assert label.tolist() == np.delete(noisy[:12], 4, axis=0).tolist()
    frame.rename(columns={"water": "sea"}).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match="other labels than the data set: sea, water"):
        module(tmp_path, noise=str(tmp_path / "other.csv")).num_classes


def test_noise_by_scores_and_by_label(tmp_path):
    make(tmp_path)
    clean = labels()[:12]
    scores = np.random.default_rng(5).normal(size=(12, 3)) + clean
    want = multilabel_scores(clean, scores, 0.25).label
    assert (want != clean).any()
    np.save(tmp_path / "scores.npy", scores)
    config = NoiseConfig("scores", 0.25, scores=str(tmp_path / "scores.npy"))
    assert module(tmp_path, noise=config).train_label.tolist() == want.tolist()
    rows = {"image": [f"scene{i:02d}" for i in range(12)], **dict(zip(NAMES, scores.T, strict=True))}
    frame = pd.DataFrame(rows)[["image", "water", "trees", "field"]]
    frame[::-1].to_parquet(tmp_path / "scores.parquet")  # other orders
    config = NoiseConfig("scores", 0.25, scores=str(tmp_path / "scores.parquet"))
    assert module(tmp_path, noise=config).train_label.tolist() == want.tolist()
    drained = module(tmp_path, noise=NoiseConfig("subtractive", 0.0, class_rates={"trees": 1.0}))
    assert drained.train_label.sum(0).tolist() == [clean[:, 0].sum(), 0, clean[:, 2].sum()]
    (tmp_path / "bad.npy").write_text("no array")
    np.save(tmp_path / "short.npy", scores[1:])
    frame[2:].to_csv(tmp_path / "short.csv", index=False)
    frame.drop(columns="trees").to_csv(tmp_path / "less.csv", index=False)
    for name, error, words in (
        ("none.npy", FileNotFoundError, "no file .*none.npy of scores"),
        ("bad.npy", ValueError, "bad.npy cannot be read as an array"),
        ("short.npy", ValueError, r"short.npy has shape \(11, 3\), but there are 12 train images"),
        ("short.csv", ValueError, "short.csv has no row for 2 of 12 train images, the first is 'scene00'"),
        ("less.csv", ValueError, "less.csv has no column 'trees'"),
    ):
        with pytest.raises(error, match=words):
            module(tmp_path, noise=NoiseConfig("scores", 0.1, scores=str(tmp_path / name))).num_classes


def test_statistics_and_default_views(tmp_path):
    make(tmp_path)
    data = module(tmp_path)
    grey = torch.arange(12) * 10 / 255
    mean, std = data.statistics
    assert mean == pytest.approx([grey.mean().item()] * 3, abs=1e-6)
    assert std == pytest.approx([grey.std(correction=0).item()] * 3, abs=1e-6)
    (saved,) = (tmp_path / "cache").glob("bands_*.json")
    saved.write_text('{"mean": [0.25, 0.5, 0.75], "std": [1.0, 2.0, 4.0]}')
    again = module(tmp_path)
    assert again.statistics == ((0.25, 0.5, 0.75), (1.0, 2.0, 4.0)), "read, not computed again"
    assert module(tmp_path, image_size=4).statistics[0] != (0.25, 0.5, 0.75)
    image = torch.full((1, 3, 8, 8), 51, dtype=torch.uint8)
    out = again.apply_views({"image": image}, training=False)["image"]
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([-0.05, -0.15, -0.1375]))
    plain = module(tmp_path, normalize=False).apply_views({"image": image}, training=True)["image"]
    torch.testing.assert_close(plain, torch.full_like(plain, 0.2))
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    views = module(tmp_path, normalize=False).default_train_view()
    from lightning_nrml.data.views import ViewKey

    corners = {round(views(ramp, ViewKey(s))[0][0, 0, 0, 0].item() * 255) for s in range(40)}
    assert corners == {0, 7, 56, 63}, "flips in both directions, and nothing is cut off"


def test_statistics_of_large_values_lose_no_digits():
    pixels = 1e4 + torch.randn(130, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    pixels[:, 1] = 7.0
    mean, std = band_statistics(MemorySource(pixels))
    assert mean[0] == pytest.approx(pixels[:, 0].double().mean().item(), rel=1e-12)
    assert std[0] == pytest.approx(pixels[:, 0].double().std(correction=0).item(), rel=1e-9)
    assert std[1] == 1.0, "a constant band is not divided by 0"
    wide = pixels[:, :, :2]
    mean, std = band_statistics(MemorySource(wide))
    assert mean[0] == pytest.approx(wide[:, 0].double().mean().item(), rel=1e-12)
    assert std[0] == pytest.approx(wide[:, 0].double().std(correction=0).item(), rel=1e-9)


def test_rasters_of_many_bands(tmp_path):
    make(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 9000, (21, 5, 12, 12), dtype=np.uint16)
    for i in range(21):
        (tmp_path / "Images" / ("a" if i % 2 else "b") / f"scene{i:02d}.png").unlink()
        raster(tmp_path / "Images" / f"scene{i:02d}.tif", pixels[i])
    data = module(tmp_path, image_size=None)
    assert data.in_channels == 5
    data.setup("fit")
    images = data.splits.train.images
    assert isinstance(images, MemorySource), "small enough to keep"
    assert images.images.dtype is torch.float32
    assert images.get([3]).equal(torch.from_numpy(pixels[3:4].astype(np.float32)))
    want = pixels[:12].transpose(1, 0, 2, 3).reshape(5, -1).astype(np.float64)
    assert data.statistics[0] == pytest.approx(want.mean(1))
    assert data.statistics[1] == pytest.approx(want.std(1))
    batch = data.apply_views(next(iter(data.train_dataloader())), training=True)
    assert batch["image"].shape == (4, 5, 12, 12)
    assert batch["image"].abs().mean() < 2
    some = module(tmp_path, image_size=6, bands=[4, 1], cache=False)
    assert some.in_channels == 2
    got = some.splits.train.images.get([0])
    assert got.shape == (1, 2, 6, 6)
    assert got[0, 0].mean().item() == pytest.approx(pixels[0, 3].mean(), rel=0.02)


def test_real_rasters(shared_data):
    pytest.importorskip("rasterio", reason=NO_RASTERIO)
    folder = shared_data("bigearthnet_v1_examples") / "BigEarthNet-v1.0"
    files = sorted(folder.glob("*/*_B04.tif"))
    source = RasterSource(files)
    assert (len(source), source.channels, source.size) == (6, 1, (120, 120))
    images = source.get(range(6))
    assert images.min() >= 0
    assert 100 < images.mean() < 3000, "raw counts of reflectance"
    with pytest.raises(BadImageError, match=r"_B05.tif is 60 x 60, but the first raster is \(120, 120\)"):
        RasterSource([files[0], str(files[0]).replace("B04", "B05")]).get([0, 1])


def test_bad_rasters_are_named(tmp_path):
    good = np.arange(2 * 4 * 4, dtype=np.float32).reshape(2, 4, 4) + 1
    files = {
        "good": raster(tmp_path / "good.tif", good),
        "nan": raster(tmp_path / "nan.tif", np.where(good == 20, np.nan, good)),
        "nodata": raster(tmp_path / "nodata.tif", np.where(good < 3, -9999, good), nodata=-9999),
        "last": raster(tmp_path / "last.tif", np.where(good == 32, -9999, good), nodata=-9999),
        "one": raster(tmp_path / "one.tif", good[:1]),
        "small": raster(tmp_path / "small.tif", good[:, :3]),
    }
    (tmp_path / "text.tif").write_text("no raster")
    files |= {"text": tmp_path / "text.tif", "lost": tmp_path / "lost.tif"}
    source = RasterSource(list(files.values()))
    assert source.get([0]).shape == (1, 2, 4, 4)
    for row, words in {
        1: "nan.tif, band 2: 1 of 16 pixels are NaN",
        2: r"nodata.tif, band 1: 2 of 16 pixels are NaN, infinite, nodata \(-9999",
        3: r"last.tif, band 2: 1 of 16 pixels are NaN, infinite, nodata \(-9999",
        4: r"one.tif has 1 bands, but bands \[1, 2\]",
        5: r"small.tif is 3 x 4, but the first raster is \(4, 4\)",
        6: "cannot read .*text.tif",
        7: "cannot read .*lost.tif",
    }.items():
        with pytest.raises(BadImageError, match=words):
            source.get([0, row])
    assert source.missing() == [7]
    assert band_statistics(source)[0] == pytest.approx([8.5, 24.5]), "unreadable ones are left out"
    with pytest.raises(BadImageError, match=r"one.tif has 1 bands"):
        RasterSource([files["good"], files["one"]], bands=[2]).get([1])
    with pytest.raises(BadImageError, match="none of the 1 rasters"):
        RasterSource([tmp_path / "lost.tif"])
    with pytest.raises(ValueError, match="numbered from 1"):
        RasterSource([files["good"]], bands=[0])


@pytest.mark.parametrize("mode", ["1", "LA", "L", "P", "RGBA", "CMYK"])
def test_a_picture_of_any_kind_may_come_first(tmp_path, mode):
    make(tmp_path)
    first = tmp_path / "Images" / "b" / "scene00.png"
    first.unlink()
    first = first.with_suffix(".jpg") if mode == "CMYK" else first
    Image.new("RGB", (12, 12), (255, 255, 255)).convert(mode).save(first)
    images = module(tmp_path).splits.train.images
    assert (images.channels, images.dtype) == (3, torch.uint8)
    assert images.get([0, 3])[:, :, 4, 4].tolist() == [[255] * 3, [30] * 3]


def test_without_rasterio_a_raster_names_the_extra_and_rgb_needs_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    file = tmp_path / "patch.tif"
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(file)
    with pytest.raises(ImportError, match=r"patch.tif must be read by rasterio.*lightning-nrml\[rs\]"):
        RasterSource([file])
    data = module(make(tmp_path, suffix=".tif"))
    assert data.in_channels == 3
    assert len(data.statistics[0]) == 3
    with pytest.raises(ImportError, match=r"scene\d\d.tif must be read by rasterio.*lightning-nrml\[rs\]"):
        module(tmp_path, bands=[1], on_bad_image="skip").num_classes


def test_a_label_that_has_two_columns_is_named(tmp_path):
    make(tmp_path, table="good.csv")
    for text in ("image,cars,trees,cars\na,0,1,1\n", "image,cars,cars\na,0,1\n"):
        (tmp_path / "twice.csv").write_text(text)
        with pytest.raises(
            ValueError, match=r"twice.csv cannot be read .* there are 2 columns 'cars'; rename"
        ):
            module(tmp_path, table="twice.csv").num_classes


def test_a_table_with_another_separator_asks_for_it(tmp_path):
    make(tmp_path, table="good.csv")
    (tmp_path / "semi.csv").write_text((tmp_path / "good.csv").read_text().replace(",", ";"))
    with pytest.raises(
        ValueError, match=r"semi.csv has one column, 'image;.*': is ';' its separator\? Save it with"
    ):
        module(tmp_path, table="semi.csv").num_classes


def test_bad_tables_and_lists_are_named(tmp_path):
    make(tmp_path)
    wrong = labels()[:, 0].astype(object)
    wrong[5] = 2
    twice = [f"scene{i:02d}" for i in range(20)] + ["scene03"]
    for change, words in (
        ({"field": wrong}, r"row 5 \(scene05\), column 'field': 2 \(1 such\); a label is 0 or 1"),
        ({"field": np.where(wrong == 2, "", wrong)}, r"column 'field': an empty cell \(1 such\); a label is"),
        (
            {"field": np.where(wrong == 2, "yes", wrong)},
            r"column 'field': 'yes' \(1 such\); a label is 0 or 1",
        ),
        ({"image": twice}, "'scene03' stands in rows 3 and 20"),
        ({"split": ["train"] * 20 + ["dev"]}, "'dev' is no split"),
        ({"split": ["test"] * 21}, "no train split"),
    ):
        make(tmp_path, table="bad.csv", **change)
        with pytest.raises(ValueError, match=words):
            module(tmp_path, table="bad.csv").num_classes
    for lines, words in (
        ("scene15\nscene01\n", "line 2: 'scene01' is in the train split already"),
        ("scene15\nscene15\n", "'scene15' is in the val split already"),
        ("scene15\nscene99\n", "line 2: 'scene99' has no row"),
        ("\n", "split_val.txt names no image: the val split is empty"),
    ):
        make(tmp_path)
        (tmp_path / "split_val.txt").write_text(lines)
        with pytest.raises(ValueError, match=words):
            module(tmp_path).num_classes
    make(tmp_path)
    for kwargs, kind, words in (
        ({"table": "none.csv"}, FileNotFoundError, "no label table"),
        ({"table": "labels.xlsx"}, ValueError, "suffix of a label table"),
        ({"images": "Pictures"}, FileNotFoundError, "no folder"),
        ({"label_columns": ["sea"]}, ValueError, "no column 'sea'; its columns are image, field"),
        ({"splits": {"train": "mine.txt"}}, FileNotFoundError, "no list .*mine.txt"),
        ({"splits": {"val": "split_val.txt"}}, ValueError, "no train split"),
        ({"noise": NoiseConfig("symmetric", 0.2)}, ValueError, "several labels per sample"),
        ({"noise": "absent.csv"}, FileNotFoundError, "no label table absent.csv; check noise"),
        ({"m_per_class": 2}, ValueError, "one class per sample"),
    ):
        with pytest.raises(kind, match=words):
            module(tmp_path, **kwargs).num_classes
    for name in COUNTS:
        (tmp_path / f"split_{name}.txt").unlink()
    with pytest.raises(ValueError, match="no column of splits"):
        module(tmp_path).num_classes


def test_lost_and_doubled_images_are_named(tmp_path):
    make(tmp_path)
    lost = tmp_path / "Images" / "a" / "scene05.png"
    lost.rename(tmp_path / "scene05.png")
    with pytest.raises(BadImageError, match=r"1 of 12 train images are missing, the first is .*scene05"):
        module(tmp_path).num_classes
    with pytest.warns(UserWarning, match="left out 1 missing"):
        assert module(tmp_path, on_bad_image="skip", noise=NoiseConfig("mixed", 0.5)).num_train_samples == 11
    (tmp_path / "scene05.png").rename(lost)
    (tmp_path / "Images" / "b" / "scene05.jpg").write_bytes(lost.read_bytes())
    with pytest.raises(ValueError, match=r"image 'scene05' is both .*scene05.png and .*scene05.jpg"):
        module(tmp_path).num_classes


def test_rasters_without_a_place_on_earth_are_read_without_a_warning(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason=NO_RASTERIO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(2):
            path = tmp_path / f"{i}.tif"
            with rasterio.open(path, "w", driver="GTiff", width=4, height=4, count=5, dtype="uint16") as file:
                file.write(np.full((5, 4, 4), i + 1, dtype=np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = RasterSource([str(tmp_path / f"{i}.tif") for i in range(2)])
        assert source.get([1, 0])[:, 4, 0, 0].tolist() == [2, 1]


def test_rasters_read_on_threads_leave_the_filters_of_warnings_as_they_are(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason=NO_RASTERIO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            tmp_path / "a.tif", "w", driver="GTiff", width=4, height=4, count=5, dtype="uint16"
        ) as file:
            file.write(np.ones((5, 4, 4), dtype=np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = RasterSource([str(tmp_path / "a.tif")] * 400)
        before = list(warnings.filters)
        assert len(cached(source)) == 400
        assert warnings.filters == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_forked_while_a_raster_is_opened_does_not_wait_for_ever(tmp_path):
    pytest.importorskip("rasterio", reason=NO_RASTERIO)
    with raster_module._opening:
        child = os.fork()
        if not child:
            os._exit(0 if raster_module._opening.acquire(timeout=5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert raster_module._opening.locked()
