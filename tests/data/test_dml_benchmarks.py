"""The official archives cannot be shipped: these folders have their layout."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from lightning_nrml.data import CarsDataModule, CUBDataModule, SOPDataModule
from lightning_nrml.data.dml_benchmarks import IMAGENET_MEAN, IMAGENET_STD


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 14, 3), value, dtype=np.uint8)).save(path)


SMALL = {"image_size": 8, "crop_size": 6}


@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Ani"]
    rows = [(i + 1, i // 2 + 1, f"{names[i // 2]}/bird_{i}.png") for i in range(8)]
    for number, _, path in rows:
        save(root / "images" / path, number)
    (root / "images.txt").write_text("".join(f"{n} {path}\n" for n, _, path in rows))
    (root / "image_class_labels.txt").write_text("".join(f"{n} {c}\n" for n, c, _ in reversed(rows)))
    (root / "classes.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    return tmp_path


def test_cub_trains_on_the_first_classes(cub):
    for root in (cub, cub / "CUB_200_2011"):
        dm = CUBDataModule(str(root), num_train_classes=2, **SMALL)
        assert dm.train_label.tolist() == [0, 0, 1, 1]
        assert dm.class_names == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
        assert dm.splits.test.label.tolist() == [2, 2, 3, 3]
        assert dm.splits.zero_shot
        # the labels' file is in another order: rows are joined by image id
        assert dm.splits.test.images.get(range(4))[:, 0, 0, 0].tolist() == [5, 6, 7, 8]


def test_cub_names_what_is_missing(cub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images\.txt; unpack the archive CUB_200_2011\.tgz"):
        CUBDataModule(str(tmp_path / "nowhere")).num_classes
    with (cub / "CUB_200_2011" / "images.txt").open("a") as file:
        file.write("9 more.png\n")
    with pytest.raises(ValueError, match="image id 9 is not in both"):
        CUBDataModule(str(cub)).num_classes
    with (cub / "CUB_200_2011" / "classes.txt").open("a") as file:
        file.write("odd\n")
    with pytest.raises(ValueError, match=r"classes\.txt, line 5: expected 2 fields, got 'odd'"):
        CUBDataModule(str(cub)).num_classes


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("image_class_labels.txt", "8 x", r"labels\.txt, line 1: the class must be a number from 1, got 'x'"),
        ("image_class_labels.txt", "8 0", r"labels\.txt, line 1: the class must be a number from 1, got '0'"),
        ("image_class_labels.txt", "8 5", r"labels\.txt, line 1: class 5 is not in .*classes\.txt"),
        (
            "images.txt",
            "2 a.png",
            r"images\.txt, line 2: id 2 stands in line 1 already; keep one of them",
        ),
        ("images.txt", "a 1.png", r"images\.txt, line 1: the id must be a number from 1, got 'a'"),
        ("classes.txt", "2 x", r"classes\.txt, line 2: id 2 stands in line 1 already"),
    ],
)
def test_cub_names_the_line_that_is_wrong(cub, file, line, message):
    path = cub / "CUB_200_2011" / file
    path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]))
    with pytest.raises(ValueError, match=message):
        CUBDataModule(str(cub)).num_classes


def test_cub_reads_lists_as_editors_leave_them(cub):
    for name in ("images.txt", "classes.txt"):
        path = cub / "CUB_200_2011" / name
        path.write_text("\n".join(reversed(path.read_text().splitlines())), encoding="utf-8-sig")
    dm = CUBDataModule(str(cub), num_train_classes=2, **SMALL)
    assert dm.class_names == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert dm.train_label.tolist() == [1, 1, 0, 0]
    path.write_bytes(b"1 Caf\xe9")
    with pytest.raises(ValueError, match=r"classes\.txt is no text in UTF-8"):
        CUBDataModule(str(cub)).num_classes


def test_default_views_crop_and_normalise(cub):
    dm = CUBDataModule(str(cub), num_train_classes=2, **SMALL)
    batch = dm.on_after_batch_transfer(next(iter(dm.test_dataloader())), 0)
    assert batch["image"].shape == (4, 3, 6, 6)
    expected = (5 / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(batch["image"][0].mean((1, 2)), expected, atol=1e-5)
    assert dm.default_train_view()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))[0].shape == (2, 3, 6, 6)
    with pytest.raises(ValueError, match="crop_size must be 1 to image_size 8"):
        CUBDataModule(str(cub), image_size=8)


def test_cars_reads_the_annotations_and_ignores_their_own_split(tmp_path):
    kinds = [(name, object) for name in ("relative_im_path", "bbox_x1", "class", "test")]
    annotations = np.empty((1, 6), dtype=kinds)
    for i in range(6):
        name = f"car_ims/{i + 1:06d}.jpg"
        save(tmp_path / name, 40 * i)
        annotations[0, i] = (name, 1, i // 2 + 1, i % 2)
    names = np.empty((1, 3), dtype=object)
    names[0] = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
    savemat(tmp_path / "cars_annos.mat", {"annotations": annotations, "class_names": names})
    dm = CarsDataModule(str(tmp_path), num_train_classes=2, **SMALL)
    assert dm.train_label.tolist() == [0, 0, 1, 1]
    assert dm.class_names == ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    assert dm.splits.test.paths == ["car_ims/000005.jpg", "car_ims/000006.jpg"]
    assert dm.splits.test.images.get([1])[0, 0, 0, 0].item() == pytest.approx(200, abs=3)
    with pytest.raises(FileNotFoundError, match=r"cars_annos\.mat; get"):
        CarsDataModule(str(tmp_path / "car_ims")).num_classes


@pytest.mark.parametrize(
    "content", [b"nonsense", {"other": 1}, {"annotations": np.zeros(2), "class_names": ["a"]}]
)
def test_cars_names_a_file_that_is_something_else(tmp_path, content):
    file = tmp_path / "cars_annos.mat"
    file.write_bytes(content) if isinstance(content, bytes) else savemat(file, content)
    with pytest.raises(ValueError, match=r"cars_annos\.mat cannot be read .*'relative_im_path' and 'class'"):
        CarsDataModule(str(tmp_path)).num_classes


def test_sop_reads_both_lists(tmp_path):
    root = tmp_path / "Stanford_Online_Products"
    lines = {"Ebay_train.txt": [(1, 1), (2, 1), (3, 2), (4, 2)], "Ebay_test.txt": [(5, 11319), (6, 11319)]}
    for name, rows in lines.items():
        text = "image_id class_id super_class_id path\n"
        for image, c in rows:
            save(root / f"bicycle_final/{image}.png", image)
            text += f"{image} {c} 1 bicycle_final/{image}.png\n"
        (root / name).write_text(text)
    dm = SOPDataModule(str(tmp_path), **SMALL)
    assert dm.train_label.tolist() == [0, 0, 1, 1]
    assert dm.splits.test.label.tolist() == [11318, 11318]
    assert dm.splits.test.images.get([0]).unique().tolist() == [5]
    (root / "bicycle_final/3.png").unlink()
    with pytest.raises(RuntimeError, match=r"1 of 4 train images are missing.*3\.png"):
        SOPDataModule(str(tmp_path), **SMALL).num_classes
    (root / "Ebay_test.txt").write_text("1 3 1 a.png\n2 3 1 b.png\n")  # the first image would be lost
    with pytest.raises(ValueError, match=r"Ebay_test\.txt, line 1: this must be the header, got '1 3 1 a"):
        SOPDataModule(str(tmp_path), **SMALL).num_classes
    (root / "Ebay_test.txt").write_text("header\n1 3 1 a.png\n2 x 1 b.png\n")
    with pytest.raises(
        ValueError, match=r"Ebay_test\.txt, line 3: the class must be a number from 1, got 'x'"
    ):
        SOPDataModule(str(tmp_path), **SMALL).num_classes
