"""What is embedded: a split of the data, or image files that are read as its own."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_nrml.data import DigitsDataModule, FolderDataModule
from lightning_nrml.data.image_files import found_images
from lightning_nrml.data.sources import BadImageError, JpegSource


def save(path, value=0, shape=(6, 8, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 255, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def data(tmp_path):
    for i in range(12):
        save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    for name in ("b.png", "deep/er/a.JPG", ".hidden/c.png", "._d.png"):
        save(tmp_path / "new" / name, 99)
    (tmp_path / "new" / "notes.txt").write_text("no image")
    return FolderDataModule(str(tmp_path / "photos"), split="images", image_size=4, eval_batch_size=3)


def rows(data):
    return list(data.predict_dataloader())


def test_a_split_comes_whole_and_in_order_with_its_names(data):
    for split, loader in (("train", data.embed_dataloader()), ("test", data.test_dataloader())):
        data.predict_from(split)
        for found, expected in zip(rows(data), loader, strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)
    data.predict_from("train")
    assert data.predict_paths == data.train_paths


def test_other_images_are_read_as_the_data_sets_own_and_have_no_labels(data, tmp_path):
    data.predict_from(images=tmp_path / "new")
    assert data.predict_paths == ["b.png", "deep/er/a.JPG"]
    (batch,) = rows(data)
    assert batch.keys() == {"image", "index"}
    assert batch["index"].tolist() == [0, 1]
    data.predict_from(images=str(tmp_path / "photos" / "a"))
    found = torch.cat([b["image"] for b in rows(data)])
    own = {name: i for i, name in enumerate(data.train_paths)}
    for row, name in enumerate(data.predict_paths):
        if f"a/{name}" in own:
            assert torch.equal(found[row], data.splits.train.images.get([own[f"a/{name}"]])[0])
    assert found.dtype == torch.uint8
    assert found.shape == (6, 3, 4, 4)


def test_images_that_are_kept_in_memory_still_know_how_they_were_read(data, tmp_path):
    data.predict_from(images=tmp_path / "new")
    before = rows(data)[0]["image"]
    data.setup("fit")
    assert torch.equal(rows(data)[0]["image"], before)


def test_a_single_image(data, tmp_path):
    data.predict_from(images=tmp_path / "new" / "b.png")
    assert data.predict_paths == ["b.png"]
    assert rows(data)[0]["image"].shape == (1, 3, 4, 4)


def test_a_broken_image_is_named_or_left_out(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a trainer the list of bad images goes there
    (tmp_path / "new" / "broken.png").write_bytes(b"nothing")
    data.predict_from(images=tmp_path / "new")
    with pytest.raises(BadImageError, match=r"broken\.png"):
        rows(data)
    data.on_bad_image = "skip"
    assert rows(data)[0]["index"].tolist() == [0, 2]
    assert "broken.png" in (tmp_path / "bad_images.tsv").read_text()


def test_errors(data, tmp_path):
    with pytest.raises(ValueError, match="split must be train, val, test, got 'all'"):
        data.predict_from("all")
    with pytest.raises(FileNotFoundError, match=r"no folder or image .*nonesuch"):
        data.predict_from(images=tmp_path / "nonesuch")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images \(\.bmp"):
        found_images(tmp_path / "empty")
    digits = DigitsDataModule()
    digits.predict_from(images=tmp_path / "new")
    with pytest.raises(ValueError, match="do not come from image files"):
        digits.predict_dataloader()


def test_jpegs_in_one_array_say_size_and_channels(tmp_path):
    buffers = []
    for i in range(4):
        save(tmp_path / f"{i}.png", i)
        buffers.append(np.frombuffer((tmp_path / f"{i}.png").read_bytes(), dtype=np.uint8))
    offsets = np.cumsum([0, *map(len, buffers)])
    source = JpegSource(np.concatenate(buffers), offsets, channels=1, image_size=5, fit="squash")
    other = source.other([str(tmp_path / f"{i}.png") for i in (2, 0)])
    assert torch.equal(other.get([0, 1]), source.get([2, 0]))


def test_rasters_keep_bands_and_units(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from lightning_nrml.data.raster import RasterSource

    paths = [tmp_path / f"{i}.tif" for i in range(3)]
    g = np.random.default_rng(0)
    for path in paths:
        with rasterio.open(
            path, "w", driver="GTiff", count=4, height=6, width=6, dtype="float32",
            transform=rasterio.transform.from_origin(0, 0, 1, 1),
        ) as file:  # fmt: skip
            file.write(g.normal(1000, 10, (4, 6, 6)).astype("float32"))
    source = RasterSource(paths[:2], bands=[4, 1], image_size=3)
    other = source.other([str(paths[2]), str(paths[0])])
    assert torch.equal(other.get([1]), source.get([0]))
    assert other.get([0]).shape == (1, 2, 3, 3)
    assert source.get([1]).shape == (1, 2, 3, 3)
    assert len(source) == len(other) == 2
