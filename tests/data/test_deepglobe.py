"""DeepGlobe: labels of tiles from masks, the label table, splits by image, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightning_nrml.data import DeepGlobeDataModule, NoiseConfig
from lightning_nrml.data.deepglobe import CLASSES, mask_shares
from lightning_nrml.data.sources import BadImageError

COLOURS = [(0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
TILE, GRID = 8, 4


def module(folder: Path, **kwargs: Any) -> DeepGlobeDataModule:
    given = {
        "tile": TILE,
        "tiles_per_image": None,
        "statistics_folder": str(folder / "kept"),
        "batch_size": 4,
    }
    return DeepGlobeDataModule(str(folder), **{**given, **kwargs})


def make(folder: Path, images: int = 10) -> np.ndarray:
    """Images of 4 x 4 tiles and three pixels too many; returns the class of each tile, 6 = unknown."""
    side = TILE * GRID + 3
    kind = np.random.default_rng(0).integers(0, 7, (images, GRID, GRID))
    (folder / "train").mkdir(parents=True)
    for i in range(images):
        colour = np.zeros((side, side, 3), dtype=np.uint8)
        pixels = np.zeros((side, side, 3), dtype=np.uint8)
        for r, c in np.ndindex(GRID, GRID):
            at = np.s_[r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE]
            colour[at] = (0, 0, 0) if kind[i, r, c] == 6 else COLOURS[kind[i, r, c]]
            pixels[at] = 10 * i + 4 * r + c
        Image.fromarray((colour * 0.9).astype(np.uint8)).save(folder / "train" / f"{i}_mask.png")  # not pure
        Image.fromarray(pixels).save(folder / "train" / f"{i}_sat.jpg", format="PNG")  # lossless
    return kind


def test_shares_of_a_mask(tmp_path) -> None:
    mask = np.zeros((9, 17, 3), dtype=np.uint8)
    for column, c in enumerate([0, 1, 2, 3, 4, 5, 5, 5]):
        mask[:8, column] = COLOURS[c]
    mask[:2, 8:16] = (255, 0, 0)  # a colour of no class
    Image.fromarray(mask).save(tmp_path / "1_mask.png")
    shares = mask_shares(tmp_path / "1_mask.png", 8)
    assert shares.shape == (1, 2, 6)
    assert shares[0, 0].tolist() == [0.125] * 5 + [0.375]
    assert shares[0, 1].tolist() == [0.0] * 6


def test_tiles_from_masks(tmp_path) -> None:
    kind = make(tmp_path)
    data = module(tmp_path, noise=NoiseConfig("mixed", 0.3))
    assert (data.num_classes, data.in_channels, data.class_names) == (6, 3, list(CLASSES))
    seen: dict[str, set[int]] = {}
    for name, split in data.splits.items():
        label = split.label if split.clean_label is None else split.clean_label
        images = split.images.get(range(len(split)))
        for path, row, image in zip(split.paths, label, images, strict=True):
            i, r, c = (int(v) for v in path.split("_"))
            assert np.flatnonzero(row).tolist() == [kind[i, r, c]], "one class, and no tile of the unknown"
            assert image.shape == (3, TILE, TILE)
            assert image.unique().tolist() == [10 * i + 4 * r + c]
            seen.setdefault(name, set()).add(i)
    assert {name: len(i) for name, i in seen.items()} == {"train": 7, "val": 1, "test": 2}
    assert len(set().union(*seen.values())) == 10, "an image is in one split"
    assert sum(len(split) for _, split in data.splits.items()) == (kind < 6).sum()
    assert module(tmp_path, split_seed=1).train_paths != data.train_paths
    some = module(tmp_path, tiles_per_image=5, image_size=4)
    per_image = pd.Series(some.train_paths).str.split("_").str[0].value_counts()
    assert per_image.max() <= 5
    assert set(some.train_paths) < set(data.train_paths)
    assert some.splits.train.images.get([0]).shape == (1, 3, 4, 4)
    more = make(tmp_path / "more", 1)
    (tmp_path / "more" / "train" / "0_mask.png").rename(tmp_path / "train" / "99_mask.png")
    (tmp_path / "more" / "train" / "0_sat.jpg").rename(tmp_path / "train" / "99_sat.jpg")
    assert more.shape == (1, GRID, GRID)
    again = module(tmp_path, tiles_per_image=5, fractions=(1.0, 0.0))
    assert set(some.train_paths) < set(again.train_paths), "a further image changes no other image's tiles"


def test_masks_are_read_once_and_the_threshold_counts(tmp_path, monkeypatch) -> None:
    make(tmp_path, 2)
    mask = np.zeros((TILE * GRID, TILE * GRID, 3), dtype=np.uint8)
    mask[:, :] = COLOURS[3]
    mask[0, :2] = COLOURS[4]  # 2 of 64 pixels = .03125 of the first tile
    Image.fromarray(mask).save(tmp_path / "train" / "0_mask.png")
    data = module(tmp_path, fractions=(1.0, 0.0))
    first = data.train_paths.index("0_0_0")
    assert data.train_label[first].tolist() == [0, 0, 0, 1, 1, 0]
    monkeypatch.setattr("lightning_nrml.data.deepglobe.mask_shares", lambda *_: 1 / 0)
    less = module(tmp_path, fractions=(1.0, 0.0), min_share=0.04)
    assert less.train_label[first].tolist() == [0, 0, 0, 1, 0, 0]
    with pytest.raises(ZeroDivisionError):
        module(tmp_path, tile=4).splits


def table(folder: Path, labels: list[Any], names: list[str]) -> None:
    pd.DataFrame({"name": names, "labels": labels}).to_parquet(folder / "labels.parquet")


def test_label_table(tmp_path) -> None:
    names = [f"t{i}" for i in range(5)]
    (tmp_path / "images").mkdir()
    for i, name in enumerate(names):
        Image.fromarray(np.full((6, 6, 3), i, dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    good = [["urban"], ["agriculture_land", "Water"], ["barren_land", "forest"], [], ["rangeland"]]
    table(tmp_path, good, names)
    for split, lines in {"train": names[:3], "val": names[3:4], "test": names[4:]}.items():
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    data = module(tmp_path)
    assert data.train_label.tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]]
    assert data.splits.val.label.sum() == 0
    assert data.splits.train.images.get([1]).unique().tolist() == [1]
    for labels, listed, words in (
        ([["lava"], *good[1:]], names[:3], r"labels.parquet, row 0 \(t0\): label 'lava' is not among urban"),
        (["urban"] * 5, names[:3], r"row 0 \(t0\): 'urban' is no list"),
        (good, [*names[:3], "t3"], "'t3' is in the train split already"),
        (good, [*names[:3], "t9"], "'t9' has no row in .*labels.parquet"),
    ):
        table(tmp_path, labels, names)
        (tmp_path / "train.csv").write_text("\n".join(listed))
        with pytest.raises(ValueError, match=words):
            module(tmp_path).splits
    table(tmp_path, good, ["t0", "t1", "t2", "t3", "t1"])
    with pytest.raises(ValueError, match="image 't1' stands in rows 1 and 4"):
        module(tmp_path).splits


def test_bad_input_is_named(tmp_path) -> None:
    make(tmp_path, 3)
    for kwargs, words in (
        ({"min_share": 1.0}, r"min_share must lie in \[0, 1\)"),
        ({"tile": 0}, "must be at least 1"),
        ({"fractions": (0.9, 0.2)}, "at most 1 together"),
        ({"tile": 64}, r"_mask.png is 35 x 35, smaller than a tile of 64"),
        ({"m_per_class": 2}, "one class per sample"),
    ):
        with pytest.raises(ValueError, match=words):
            module(tmp_path, **kwargs).splits
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "train" / "0_sat.jpg")
    data = module(tmp_path, fractions=(1.0, 0.0), cache=False)
    with pytest.raises(BadImageError, match=r"tile \[3, \d\] of .*0_sat.jpg .*smaller than its mask"):
        data.splits.train.images.get([next(i for i, p in enumerate(data.train_paths) if p.startswith("0_3"))])
    (tmp_path / "train" / "0_sat.jpg").unlink()
    with pytest.raises(
        BadImageError, match=r"\d+ of \d+ train images are missing, the first is tile .*0_sat.jpg"
    ):
        module(tmp_path, fractions=(1.0, 0.0)).splits
    (tmp_path / "train" / "1_mask.png").write_text("no image")
    with pytest.raises(BadImageError, match=r"cannot read .*1_mask\.png"):
        module(tmp_path).splits
    with pytest.raises(FileNotFoundError, match=r"neither labels\.parquet nor any"):
        module(tmp_path / "empty").splits
