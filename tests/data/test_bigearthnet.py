"""BigEarthNet: real example patches, both layouts, LMDB, labels in both nomenclatures, what is left out."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bigearthnet_layout import (
    NO_LMDB,
    NO_RASTERIO,
    make_v2,
    module,
    planes,
    v1_names,
    v2_names,
    write_json,
    write_lmdb,
    write_metadata,
)

from lightning_nrml.data import NoiseConfig, bigearthnet_source
from lightning_nrml.data.bigearthnet_classes import (
    BAND_SETS,
    CLASSES_19,
    CLASSES_43,
    S1_SIDES,
    S2_SIDES,
    STATISTICS,
    TO_19,
)
from lightning_nrml.data.bigearthnet_index import read_patch_table
from lightning_nrml.data.sources import BadImageError

#: patch -> indices among the 19 classes and names among the 43, as its JSON file has them
EXAMPLES = {
    "S2A_MSIL2A_20170613T101031_87_48": ([2, 6], ["Non-irrigated arable land", CLASSES_43[20]]),
    "S2A_MSIL2A_20170617T113321_36_85": ([2, 4], ["Non-irrigated arable land", "Pastures"]),
    "S2A_MSIL2A_20170617T113321_4_55": ([4], ["Pastures"]),
    "S2A_MSIL2A_20171221T112501_56_35": (
        [5, 6, 8, 13],
        [
            "Complex cultivation patterns",
            CLASSES_43[20],
            "Broad-leaved forest",
            "Transitional woodland/shrub",
        ],
    ),
    "S2B_MSIL2A_20170924T93020_69_24": (
        [9, 10, 13, 15, 17],
        ["Coniferous forest", "Mixed forest", "Transitional woodland/shrub", "Peatbogs", "Water bodies"],
    ),
    "S2B_MSIL2A_20180204T94161_57_38": (
        [2, 9, 10],
        ["Non-irrigated arable land", "Coniferous forest", "Mixed forest"],
    ),
}


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, list[str], list[str]]:
    """A v2 archive of 5 patches: 3 train, 1 validation, 1 test."""
    return (tmp_path, *make_v2(tmp_path))


def test_nomenclature() -> None:
    assert (len(CLASSES_19), len(CLASSES_43), len(set(CLASSES_43))) == (19, 43, 43)
    # the table of arXiv 2105.07921: which of the 43 make each of the 19, and the 11 that are dropped
    groups = [[0, 1], [2], [11, 12, 13], [14, 15, 16, 18], [17], [19], [20], [21], [22], [23], [24], [25, 31]]
    groups += [[26, 27], [28], [29], [33, 34], [35, 36], [38, 39], [40, 41, 42]]
    assert [np.flatnonzero(c == TO_19).tolist() for c in range(19)] == groups
    assert np.flatnonzero(TO_19 < 0).tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 30, 32, 37]
    same = [c for c in range(43) if CLASSES_43[c] in CLASSES_19]
    assert [CLASSES_19[TO_19[c]] for c in same] == [CLASSES_43[c] for c in same]
    assert len(same) == 9


@pytest.mark.parametrize("nomenclature", [19, 43])
def test_real_labels(shared_data, tmp_path, nomenclature) -> None:
    data = module(shared_data("bigearthnet_v1_examples"), tmp_path, nomenclature=nomenclature)
    assert (data.num_classes, data.in_channels, data.version) == (nomenclature, 12, 1)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 3, "val": 1, "test": 2}
    for split in (data.splits.train, data.splits.val, data.splits.test):
        for patch, row in zip(split.paths, split.label, strict=True):
            ids, names = EXAMPLES[patch]
            want = ids if nomenclature == 19 else [CLASSES_43.index(name) for name in names]
            assert np.flatnonzero(row).tolist() == want, patch
    assert data.class_names[2] == ("Arable land" if nomenclature == 19 else "Industrial or commercial units")


@pytest.mark.parametrize("bands", ["s2", "s1", "both", "rgb", ["VH", "B8A", "B01"]])
def test_real_pixels(shared_data, tmp_path, bands) -> None:
    rasterio = pytest.importorskip("rasterio", reason=NO_RASTERIO)
    folder = shared_data("bigearthnet_v1_examples")
    data = module(folder, tmp_path, bands=bands, cache=False)
    names = BAND_SETS[bands] if isinstance(bands, str) else bands
    assert data.in_channels == len(names)
    assert list(S2_SIDES)[7:10] == ["B08", "B8A", "B09"], "by wavelength"
    assert list(names) == {
        "s2": list(S2_SIDES),
        "s1": ["VV", "VH"],
        "both": [*S2_SIDES, "VV", "VH"],
        "rgb": ["B04", "B03", "B02"],
    }.get(str(bands), bands)
    lists = [line.split(",") for line in (folder / "bigearthnet-train.csv").read_text().split()]
    images = data.splits.train.images.get(range(3))
    assert images.shape == (3, len(names), 120, 120)
    assert images.dtype is torch.float32
    for image, (s2, s1) in zip(images, lists, strict=True):
        for band, got in zip(names, image, strict=True):
            patch, archive = (s1, "BigEarthNet-S1-v1.0") if band in S1_SIDES else (s2, "BigEarthNet-v1.0")
            with rasterio.open(folder / archive / patch / f"{patch}_{band}.tif") as file:
                plane = file.read(1)
            if plane.shape == (120, 120):  # counts and dB as they are: nothing scaled, nothing rounded
                assert np.array_equal(got.numpy(), plane.astype(np.float32))
            else:
                assert got.mean().item() == pytest.approx(plane.mean(), rel=0.01)
                assert got.min() >= plane.min()
                assert got.max() <= plane.max()
            if band in S1_SIDES:
                assert -40 < got.mean() < 0
                assert (got != got.round()).float().mean() > 0.99, "fractions of dB"


def test_real_radar_alone_and_one_column_lists(shared_data, tmp_path) -> None:
    pytest.importorskip("rasterio", reason=NO_RASTERIO)
    folder = shared_data("bigearthnet_v1_examples")
    (tmp_path / "BigEarthNet-S1-v1.0").symlink_to(folder / "BigEarthNet-S1-v1.0")
    for name in ("train", "val", "test"):
        lines = (folder / f"bigearthnet-{name}.csv").read_text().split()
        (tmp_path / f"{name}.csv").write_text("\n".join(line.split(",")[0] for line in lines))
    data = module(tmp_path, tmp_path / "cache", bands="s1")
    both = module(folder, tmp_path / "cache", bands="s1")
    for name in ("train", "val", "test"):
        one, two = getattr(data.splits, name), getattr(both.splits, name)
        assert one.label.tolist() == two.label.tolist()
        rows = range(len(one))
        assert torch.equal(one.images.get(rows), two.images.get(rows)), "the pairs are in the JSON files"


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic"])
def test_resampling_aligns_centres(archive, resample) -> None:
    root = archive[0]
    data = module(root, root / "cache", bands=["B05", "B01"], resample=resample, cache=False)
    got = data.splits.train.images.get([0])[0].numpy()
    for image, band, factor in ((got[0], "B05", 2), (got[1], "B01", 6)):
        plane = planes(0, list(S2_SIDES))[band].astype(np.float64)
        if resample == "nearest":
            assert np.array_equal(image, plane.repeat(factor, 0).repeat(factor, 1))
            continue
        if resample == "bilinear":  # by hand, along both sides
            centre = (np.arange(120) + 0.5) / factor - 0.5
            low = np.clip(np.floor(centre).astype(int), 0, len(plane) - 1)
            high, share = np.minimum(low + 1, len(plane) - 1), np.clip(centre, 0, None) - low
            rows = plane[low] * (1 - share)[:, None] + plane[high] * share[:, None]
            want = rows[:, low] * (1 - share) + rows[:, high] * share
            np.testing.assert_allclose(image, want, rtol=1e-4)
        assert image.mean() == pytest.approx(plane.mean(), rel=0.02)


def test_v2_layout_statistics_and_batches(archive) -> None:
    root, s2, _ = archive
    data = module(root, root / "cache", bands="both")
    assert data.version == 2
    assert data.train_paths == s2[:3]
    assert data.splits.val.paths == [s2[3]]
    assert [np.flatnonzero(row).tolist() for row in data.splits.test.label] == [[4, 5]]
    data.setup("fit")
    image = data.splits.train.images.get([1])[0]
    assert np.array_equal(image[1].numpy(), planes(1, list(S2_SIDES))["B02"].astype(np.float32))
    assert np.array_equal(image[12].numpy(), planes(1001, list(S1_SIDES))["VV"])
    assert np.array_equal(image[13].numpy(), planes(1001, list(S1_SIDES))["VH"])
    radar = data.splits.test.images.get([0])[0, 12]
    assert np.array_equal(radar.numpy(), planes(1004, list(S1_SIDES))["VV"]), (
        "of the same patch in every split"
    )
    mixed = module(root, root / "cache", bands=["VV", "B02"], cache=False).splits.train.images
    radar, blue = (
        mixed.subset(np.array([1, 2])).get([0])[0].numpy()
    )  # of one size, and not in the sets' order
    assert np.array_equal(radar, planes(1001, list(S1_SIDES))["VV"])
    assert np.array_equal(blue, planes(1, list(S2_SIDES))["B02"].astype(np.float32))
    mean, std = data.statistics
    assert (mean[12], std[13]) == (STATISTICS["VV"][0], STATISTICS["VH"][1])
    out = data.apply_views({"image": image[None]}, training=False)["image"]
    torch.testing.assert_close(out[0, 12], (image[12] - mean[12]) / std[12])
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 14, 120, 120)
    assert batch["label"].tolist() == data.train_label[batch["index"]].tolist()
    own = module(root, root / "cache", bands="s1", band_statistics="train").statistics
    vv = np.stack([planes(1000 + i, list(S1_SIDES))["VV"] for i in range(3)])
    assert own[0][0] == pytest.approx(vv.mean(), rel=1e-5)
    assert own[1][0] == pytest.approx(vv.std(), rel=1e-5)


def test_kept_statistics_are_those_of_the_bands_in_their_order_and_of_the_resampling(archive) -> None:
    pytest.importorskip("lmdb", reason=NO_LMDB)
    from safetensors.numpy import save

    root, s2, _ = archive
    write_lmdb(root / "ben.lmdb", {name: save(planes(i, list(S2_SIDES))) for i, name in enumerate(s2)})

    def found(bands: list[str], resample: str = "bilinear") -> np.ndarray:
        options = {"resample": resample, "band_statistics": "train", "lmdb": "ben.lmdb"}
        return np.asarray(module(root, root / "cache", bands=bands, **options).statistics)

    one = found(["B02", "B05"])
    np.testing.assert_allclose(found(["B05", "B02"]), one[:, ::-1])
    assert found(["B02", "B05"], "nearest")[1, 1] > 1.1 * one[1, 1], "a mean of pixels varies less"
    bigearthnet_source._close_all()


@pytest.mark.parametrize("cache", [True, False])
def test_pictures_show_red_green_blue(archive, cache) -> None:
    root = archive[0]
    want = module(root, root / "cache", bands="rgb", cache=False).splits.train.images.pictures([2, 0])
    for bands in ("s2_10m_20m", "both", "rgb", ["B02", "B03", "B04"]):
        data = module(root, root / "cache", bands=bands, cache=cache)
        data.setup("fit")
        got = data.splits.train.images.pictures([2, 0])
        assert (got.dtype, got.shape) == (torch.uint8, (2, 3, 120, 120))
        assert torch.equal(got, want), bands
    radar = module(root, root / "cache", bands=["VV", "B04"], cache=cache).splits.train.images
    assert radar.pictures([1]).shape == (1, 2, 120, 120)


def test_noise_on_train_only_and_from_a_table(archive) -> None:
    root, s2, _ = archive
    data = module(root, root / "cache", noise=NoiseConfig("additive", 1.0))
    clean = data.train_clean_label
    assert int(data.train_is_noise.sum()) == int((data.train_label - clean).sum()) > 0
    assert data.splits.val.label.sum() == 2
    label = 1 - clean.numpy()
    frame = pd.DataFrame({"patch": s2[:3], **dict(zip(data.class_names, label.T, strict=True))})
    frame[::-1].to_csv(root / "noisy.csv", index=False)
    again = module(root, root / "cache", noise=str(root / "noisy.csv"))
    assert np.array_equal(again.train_label, label)
    with pytest.raises(ValueError, match="one class per sample"):
        module(root, root / "cache", m_per_class=2)


def test_lmdb_equals_folders_also_in_workers_and_twice_in_a_process(archive) -> None:
    pytest.importorskip("lmdb", reason=NO_LMDB)
    from safetensors.numpy import save

    root, s2, s1 = archive
    values = {name: save(planes(i, list(S2_SIDES))) for i, name in enumerate(s2)}
    values |= {name: save(planes(1000 + i, list(S1_SIDES))) for i, name in enumerate(s1)}
    values |= {
        s2[0]: save({b: p[None] for b, p in planes(0, list(S2_SIDES)).items()})
    }  # (1, H, W) is usual, too
    write_lmdb(root / "ben.lmdb", values)
    folders = module(root, root / "cache", bands="both", cache=False)
    want = folders.splits.train.images.get(range(3))
    data = module(root, root / "cache", bands="both", lmdb="ben.lmdb", cache=False, num_workers=2)
    other = module(root, root / "cache", bands=["VH"], lmdb="ben.lmdb", cache=False)
    assert torch.equal(other.splits.train.images.get(range(3))[:, 0], want[:, 13])
    assert torch.equal(data.splits.train.images.get(range(3)), want)
    got = {int(i): x for b in data.embed_dataloader() for i, x in zip(b["index"], b["image"], strict=True)}
    assert torch.equal(torch.stack([got[i] for i in range(3)]), want)
    # a child must not go on with what its parent opened
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(list(bigearthnet_source._OPEN)))
    child.start()
    assert queue.get() == []
    child.join()
    assert list(bigearthnet_source._OPEN) == [str((root / "ben.lmdb").resolve())]
    single = root / "one_file.lmdb"  # the database without its folder
    shutil.copy(root / "ben.lmdb/data.mdb", single)
    alone = module(root, root / "cache", bands="both", lmdb=single.name, cache=False)
    assert torch.equal(alone.splits.train.images.get(range(3)), want)
    bigearthnet_source._OPEN.pop(str(single.resolve())).close()
    del values[s1[1]]
    write_lmdb(
        root / "less.lmdb",
        {**values, s2[2]: save({"B02": planes(2, ["B02"])["B02"]}), s2[0]: b"\x80\x04pickle"},
    )
    with pytest.raises(BadImageError, match=rf"1 of 3 train images are missing.*{s1[1]} in .*less.lmdb"):
        module(root, root / "cache", bands="both", lmdb="less.lmdb").splits
    bad = module(root, root / "cache", lmdb="less.lmdb", cache=False).splits.train.images
    with pytest.raises(BadImageError, match=f"band B01 of patch {s2[2]} in .* is missing; it has B02"):
        bad.get([2])
    with pytest.raises(BadImageError, match=f"patch {s2[0]} in .* is no safetensors.*pickles are not read"):
        bad.get([0])
    with pytest.raises(FileNotFoundError, match="no LMDB"):
        module(root, root / "cache", lmdb="none.lmdb").splits
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lmdb", None)
        with pytest.raises(ImportError, match=r"ben.lmdb must be read by lmdb.*lightning-nrml\[rs\]"):
            module(root, root / "cache", lmdb="ben.lmdb").splits


def test_what_is_left_out(tmp_path) -> None:
    s2, s1 = v1_names(10)
    write_json(tmp_path, s2, s1)  # row i has class i of the 43; classes 3 to 9 are not among the 19
    (tmp_path / "train.csv").write_text("\n".join(s2[:6]) + "\n")
    with pytest.warns(UserWarning, match=rf"left out 3 train patches that have none of the 19.*{s2[3]}"):
        assert module(tmp_path, tmp_path / "cache").train_paths == s2[:3]
    (tmp_path / "test.csv").write_text(s2[6])
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="none of 1 test p"):
        module(tmp_path, tmp_path / "cache").splits
    data = module(tmp_path, tmp_path / "cache", nomenclature=43)
    assert data.train_paths == s2[:6]
    (tmp_path / "patches_with_seasonal_snow.csv").write_text(f"{s2[1]}\nS2A_elsewhere\n")
    (tmp_path / "patches_with_cloud_and_shadow.csv").write_text(s2[5])
    (tmp_path / "mine.csv").write_text(s2[4])
    (tmp_path / "val.csv").write_text(s2[9])  # the last one of the archive
    data = module(tmp_path, tmp_path / "cache", nomenclature=43, exclude=["mine.csv"])
    assert data.train_paths == [s2[i] for i in (0, 2, 3)]
    assert data.splits.val.paths == [s2[9]]
    assert data.train_label.argmax(1).tolist() == [0, 2, 3]
    (tmp_path / "first.csv").write_text(s2[0])  # the first one of the archive, and no other
    data = module(tmp_path, tmp_path / "cache", nomenclature=43, exclude=["first.csv"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.train_paths == [s2[i] for i in (2, 3, 4)]
    keep = module(tmp_path, tmp_path / "cache", nomenclature=43, keep_snow_and_cloud=True)
    assert keep.train_paths == s2[:6]
    (tmp_path / "mine.csv").write_text(f"{s1[4]}\n{s1[5]}\n")  # names of the other sensor
    same = module(tmp_path, tmp_path / "cache", nomenclature=43, exclude=["mine.csv"])
    with pytest.warns(UserWarning, match=r"none of the 2 patches in .*mine.csv is in .*: it leaves nothing"):
        assert same.train_paths == [s2[i] for i in (0, 2, 3, 4)]


def test_lists_that_lie_in_the_folder_of_v2_do_not_overrule_its_table(archive) -> None:
    root, s2, _ = archive
    (root / "train.csv").write_text(s2[4])
    assert module(root, root / "cache", cache=False).train_paths == s2[:3]
    given = module(root, root / "cache", cache=False, splits={"train": "train.csv"})
    assert given.train_paths == s2[4:]


def test_a_table_of_v1_has_43_names_and_spares_the_json_files(tmp_path) -> None:
    s2, _ = v1_names(3)
    for name in s2:  # without JSON files
        (tmp_path / "BigEarthNet-v1.0" / name).mkdir(parents=True)
    labels = [["Rice fields"], ["Airports", "Salines"], ["Sea and ocean"]]
    pq.write_table(
        pa.table({"patch_id": s2, "labels": labels, "split": ["train", "train", "test"]}),
        tmp_path / "metadata.parquet",
    )
    data = module(tmp_path, tmp_path / "cache")
    assert data.version == 1
    assert [np.flatnonzero(row).tolist() for row in data.train_label] == [[2], [16]]
    assert data.splits.val is None, "no row says validation"
    assert np.flatnonzero(data.splits.test.label[0]).tolist() == [18]
    assert module(tmp_path, tmp_path / "cache", nomenclature=43).train_label[1].sum() == 2


def test_v2_snow_cloud_and_countries(tmp_path) -> None:
    s2, s1 = v2_names(8)
    for name in s2:
        (tmp_path / "BigEarthNet-S2" / name.rsplit("_", 2)[0] / name).mkdir(parents=True)
    flags = {
        "contains_seasonal_snow": [False, True] + [False] * 3,
        "contains_cloud_or_shadow": [True] + [False] * 4,
    }
    write_metadata(tmp_path / "metadata.parquet", s2[:5], s1[:5], country=list("AABAA"), **flags)
    more = "metadata_for_patches_with_snow_cloud_or_shadow.parquet"
    write_metadata(tmp_path / more, s2[5:], s1[5:], country=["A"] * 3, **{k: [True] * 3 for k in flags})
    assert module(tmp_path, tmp_path).train_paths == [s2[2]]
    assert module(tmp_path, tmp_path, keep_snow_and_cloud=True).train_paths == [*s2[:3], *s2[5:]]
    chosen = module(tmp_path, tmp_path, keep_snow_and_cloud=True, countries=["A"])
    assert chosen.train_paths == [*s2[:2], *s2[5:]]
    with pytest.raises(ValueError, match="no patch of 'Utopia'; its countries are A, B"):
        module(tmp_path, tmp_path, countries=["Utopia"]).splits


def test_the_table_of_json_files_is_kept_and_made_anew_when_patches_come(tmp_path, monkeypatch) -> None:
    from lightning_nrml.data import bigearthnet_index

    s2, s1 = v1_names(4)
    write_json(tmp_path, s2, s1)
    (tmp_path / "train.csv").write_text("\n".join(s2[:3]))
    reads: list[str] = []
    read = bigearthnet_index._read_json
    monkeypatch.setattr(bigearthnet_index, "_read_json", lambda f, n, s: reads.append(n) or read(f, n, s))
    data = module(tmp_path, tmp_path / "cache")
    data.prepare_data()
    assert sorted(reads) == s2
    assert data.train_label.argmax(1).tolist() == [0, 0, 1]
    assert len(reads) == 4, "read once"
    module(tmp_path, tmp_path / "cache", bands="s1").splits
    assert len(reads) == 8, "the pairs are in the other files"
    write_json(tmp_path, ["S2A_new"], ["S1A_new"])
    (tmp_path / "val.csv").write_text("S2A_new")
    assert module(tmp_path, tmp_path / "cache").splits.val.paths == ["S2A_new"]
    (kept, *_) = sorted((tmp_path / "cache").glob("bigearthnet_*.parquet"))
    assert {"patch_id", "labels"} <= set(pq.read_schema(kept).names)


def test_v2_snow_and_cloud_in_words(tmp_path) -> None:
    """Where a program wrote the flags as text, "False" is no snow."""
    s2, s1 = v2_names(5)
    snow = ["True", "False", "0", "1", None]
    write_metadata(tmp_path / "metadata.parquet", s2, s1, contains_seasonal_snow=snow)
    rows = read_patch_table(tmp_path / "metadata.parquet", 19, 19).keep
    assert rows.tolist() == [False, True, True, False, True]
    write_metadata(tmp_path / "metadata.parquet", s2, s1, contains_seasonal_snow=["maybe", *snow[1:]])
    with pytest.raises(ValueError, match="'contains_seasonal_snow', row 0: 'maybe'; true/false or 1/0"):
        read_patch_table(tmp_path / "metadata.parquet", 19, 19)
