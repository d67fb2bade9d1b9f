"""BigEarthNet: whatever is wrong with its files, tables and lists is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bigearthnet_layout import make_v2, module, planes, v1_names, v2_names, write_json, write_tif

from lightning_nrml.data import NoiseConfig
from lightning_nrml.data.bigearthnet_classes import S1_SIDES, S2_SIDES
from lightning_nrml.data.sources import BadImageError


def test_bad_files_are_named(tmp_path, monkeypatch) -> None:
    root, (s2, s1) = tmp_path, make_v2(tmp_path)
    monkeypatch.chdir(root)  # on_bad_image: skip writes its list here

    def file(row: int, band: str) -> Path:
        names, folder, cut = (s1, "BigEarthNet-S1", 3) if band in S1_SIDES else (s2, "BigEarthNet-S2", 2)
        return root / folder / names[row].rsplit("_", cut)[0] / names[row] / f"{names[row]}_{band}.tif"

    made = planes(0, list(S2_SIDES))
    hole = planes(9, ["VV"])["VV"]
    hole[3, 4] = np.nan
    write_tif(file(1, "B04"), made["B04"] + 1, nodata=0)  # none of its pixels is
    for band, change, words in (
        ("B05", lambda f: f.unlink(), "band file .*_B05.tif is missing"),
        ("B02", lambda f: f.write_text("no raster"), r"cannot read .*_B02.tif \(Rasterio"),
        ("B03", lambda f: write_tif(f, made["B05"]), r"_B03.tif is 60 x 60, but B03 has 120 x 120 pixels"),
        ("B01", lambda f: write_tif(f, made["B01"][:, :19]), r"_B01.tif is 20 x 19, but B01 has 20 x 20"),
        ("VV", lambda f: write_tif(f, hole), "_VV.tif: 1 of 14400 pixels are NaN or infinite"),
        (
            "VH",
            lambda f: write_tif(f, made["B02"].astype(np.int16)),
            "_VH.tif is int16, but Sentinel-1 is in fract",
        ),
        (
            "B04",
            lambda f: write_tif(f, made["B04"] // 8000, nodata=0),
            r"_B04.tif: \d+ of 14400 pixels are nodata",
        ),
    ):
        change(file(0, band))
        images = module(root, root / "cache", bands=[band], cache=False).splits.train.images
        with pytest.raises(BadImageError, match=words):
            images.get([1, 0])
        assert images.get([1]).shape == (1, 1, 120, 120)
    skip = module(
        root, root / "cache", bands=["B05"], cache=False, on_bad_image="skip", noise=NoiseConfig("mixed", 0.5)
    )
    batch = next(iter(skip.embed_dataloader()))
    assert batch["index"].tolist() == [1, 2], "the patch with a lost band is left out of evaluation"
    file(2, "VV").parent.rename(root / "away")
    with pytest.raises(BadImageError, match=f"1 of 3 train images are missing, the first is .*{s1[2]}"):
        module(root, root / "cache", bands="s1").splits
    # not the Sentinel-2 patch, which is there
    with pytest.raises(BadImageError, match=f"1 of 3 train images are missing, the first is .*{s1[2]}"):
        module(root, root / "cache", bands="both").splits


def test_bad_tables_are_named(tmp_path) -> None:
    s2, s1 = v2_names(5)
    (tmp_path / "BigEarthNet-S2").mkdir()
    frame = {"patch_id": s2, "s1_name": s1, "split": ["train"] * 5, "labels": [["Pastures"]] * 5}
    for change, words in (
        (
            {"labels": [["Pastures"], ["Pastures", "Meadow"]] + [[]] * 3},
            rf"row 1 \({s2[1]}\): label 'Meadow' is not among",
        ),
        (
            {"labels": [["Pastures"], None, [], ["Pastures", None], ["Pastures"]]},
            rf"column 'labels', row 3 \({s2[3]}\): a label is empty; remove it",
        ),
        (
            {"labels": [["Olive groves"]] * 5},
            "label 'Olive groves' is not among the 19 classes of BigEarthNet v2",
        ),
        ({"patch_id": [*s2[:4], s2[1]]}, f"'{s2[1]}' stands in rows 1 and 4"),
        ({"patch_id": [*s2[:4], None]}, "column 'patch_id', row 4: empty"),
        ({"split": ["train"] * 4 + ["dev"]}, rf"column 'split', row 4 \({s2[4]}\): 'dev'"),
        ({"split": ["test"] * 5}, "train split is empty"),
        ({"labels": ["Pastures"] * 5}, "column 'labels' holds large_string, not lists"),
    ):
        pd.DataFrame({**frame, **change}).to_parquet(tmp_path / "metadata.parquet")
        with pytest.raises(ValueError, match=words):
            module(tmp_path, tmp_path).splits
    pd.DataFrame({"patch_id": s2}).to_parquet(tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match="no column 'labels', its columns are patch_id"):
        module(tmp_path, tmp_path).splits
    (tmp_path / "metadata.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"metadata.parquet cannot be read as a table"):
        module(tmp_path, tmp_path).splits
    for kwargs, error, words in (
        ({"nomenclature": 43}, ValueError, "v2 has 19 classes only"),
        ({"nomenclature": 20}, ValueError, "nomenclature must be one of 19, 43, got 20"),
        ({"bands": "s3"}, ValueError, "'s3' is no set of bands"),
        ({"bands": ["B10"]}, ValueError, "no band 'B10' in BigEarthNet; its bands are B01"),
        ({"bands": ["B02", "B02"]}, ValueError, "none twice"),
        ({"metadata": "other.parquet"}, FileNotFoundError, "no table .*other.parquet"),
    ):
        with pytest.raises(error, match=words):
            module(tmp_path, tmp_path, **kwargs).splits
    with pytest.raises(FileNotFoundError, match=r"no BigEarthNet in .*v1 has BigEarthNet-v1\.0"):
        module(tmp_path / "empty", tmp_path).splits


def test_a_split_of_which_nothing_is_left_says_by_what(tmp_path) -> None:
    s2, s1 = v2_names(5)
    (tmp_path / "BigEarthNet-S2").mkdir()
    (tmp_path / "away.csv").write_text(f"{s2[4]}\n")
    frame = {"patch_id": s2, "s1_name": s1, "split": ["train"] * 4 + ["test"], "labels": [["Pastures"]] * 5}
    for change, kwargs, words in (
        (
            {"country": ["Austria"] * 4 + ["Ireland"]},
            {"countries": ["Austria"]},
            r"those outside countries \['Austria'\], .*keep_snow_and_cloud false\), those with none",
        ),
        ({"contains_seasonal_snow": [False] * 4 + [True]}, {}, "out: those under snow.*keep_snow"),
        (
            {},
            {"exclude": ["away.csv"], "keep_snow_and_cloud": True},
            r"out: those in exclude \['away.csv'\], those w",
        ),
        (
            {"labels": [["Pastures"]] * 4 + [[]]},
            {"keep_snow_and_cloud": True},
            "out: those with none of the 19 classes; change",
        ),
    ):
        pd.DataFrame({**frame, **change}).to_parquet(tmp_path / "metadata.parquet")
        with pytest.raises(ValueError, match=f"metadata.parquet: none of 1 test patches is left, .*{words}"):
            module(tmp_path, tmp_path, **kwargs).splits


def test_bad_lists_and_json_are_named(tmp_path) -> None:
    s2, s1 = v1_names(6)
    write_json(tmp_path, s2, s1, step=11)
    lists = {"train": f"{s2[0]}\n{s2[1]}\n", "val": f"{s2[2]}\n", "test": f"{s2[3]}\n"}
    for name, text, words in (
        (
            "val",
            f"{s2[2]}\n{s2[1]}\n",
            rf"bigearthnet-val.csv, line 2: patch '{s2[1]}' is in the train split already",
        ),
        ("val", f"{s2[2]}\n\n{s2[1]}\n", "bigearthnet-val.csv, line 2: ''; a line is"),
        ("val", f"{s2[2]}\n{s2[2]}\n", f"patch '{s2[2]}' stands in lines 1 and 2"),
        # the first line that repeats another, not the first that is repeated
        ("val", "".join(f"{s2[i]}\n" for i in (2, 4, 4, 2)), f"patch '{s2[4]}' stands in lines 2 and 3"),
        (
            "test",
            f"{s2[4]}\nS2A_9\n",
            r"bigearthnet-test.csv, line 2: patch 'S2A_9' \(1 such\) is not in the JSON files",
        ),
        ("test", "", "bigearthnet-test.csv names no patch: the test split is empty"),
        ("test", f"{s2[4]},a,b", "line 1: .*a line is <Sentinel-2 name>"),
        ("test", f"\ufeff{s2[4]}\nS2A_ä\n", r"test.csv, line 2: 'S2A_\\xe4'; a line is .* in ASCII"),
    ):
        for split, usual in lists.items():
            (tmp_path / f"bigearthnet-{split}.csv").write_text(
                text if split == name else usual, encoding="utf-8"
            )
        with pytest.raises(ValueError, match=words):
            module(tmp_path, tmp_path / "cache", nomenclature=43).splits
    for split, usual in lists.items():
        (tmp_path / f"bigearthnet-{split}.csv").write_text(f"\ufeff{usual}", encoding="utf-8")
    data = module(tmp_path, tmp_path / "cache", nomenclature=43)
    assert data.train_paths[0] == s2[0], "the mark that Windows programs put before a list is no part of it"
    for kwargs, words in (
        ({"splits": {"val": "bigearthnet-val.csv"}}, "there is no train split"),
        ({"splits": {"train": "bigearthnet-train.csv", "dev": "bigearthnet-val.csv"}}, "'dev' is no split"),
    ):
        with pytest.raises(ValueError, match=words):
            module(tmp_path, tmp_path / "cache", nomenclature=43, **kwargs).splits
    (tmp_path / "BigEarthNet-S1-v1.0").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"no folder .*BigEarthNet-S1-v1.0; check path, or bands"):
        module(tmp_path, tmp_path / "cache", nomenclature=43, bands="s1").splits
    (tmp_path / "away").rename(tmp_path / "BigEarthNet-S1-v1.0")
    with pytest.raises(FileNotFoundError, match=r"no list .*snow.csv"):
        module(tmp_path, tmp_path / "cache", nomenclature=43, exclude=["snow.csv"]).splits
    file = tmp_path / "BigEarthNet-v1.0" / s2[5] / f"{s2[5]}_labels_metadata.json"
    for number, (text, error, words) in enumerate(
        (
            (
                '{"labels": ["Meadow"]}',
                ValueError,
                rf"{file.name}: label 'Meadow' is not among the 43 classes",
            ),
            ("{", ValueError, f"{file.name} is no JSON"),
            ("{}", ValueError, f"{file.name} has no key 'labels'"),
            (None, FileNotFoundError, f"{s2[5]} has no .*{file.name}"),
        )
    ):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(error, match=words):
            module(tmp_path, tmp_path / f"cache{number}", nomenclature=43).splits
