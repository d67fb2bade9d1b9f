"""The usual zero-shot benchmarks of metric learning, read from their official file layouts."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.sources import FileSource, Fit
from lightning_nrml.data.splits import Splits, split_by_rows
from lightning_nrml.data.views import EvalView, MetricView, Views

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ZeroShotBenchmark(NRMLDataModule):
    """Base of the benchmarks: image files, train classes apart from test classes.

    Images are stored at ``image_size``; the default views cut ``crop_size`` out of that and normalise as
    networks pre-trained on ImageNet expect.

    Args:
        root: the unpacked folder.
        image_size: short side of the stored square.
        crop_size: side of what the network sees with the default views.
        fit: ``"crop"`` cuts the centre square, ``"squash"`` ignores the aspect ratio.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(
        self, root: str, image_size: int = 256, crop_size: int = 224, fit: Fit = "crop", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < crop_size <= image_size:
            raise ValueError(f"crop_size must be 1 to image_size {image_size}, got {crop_size}")
        self.root, self.image_size, self.crop_size, self.fit = root, image_size, crop_size, fit

    @abstractmethod
    def read(self, root: Path) -> tuple[list[str], np.ndarray, np.ndarray, list[str] | None]:
        """Image paths below ``root``, labels from 0 ``(N,)``, which rows train ``(N,)`` bool, class names."""

    def load_splits(self) -> Splits:
        root = Path(self.root).expanduser()
        paths, label, train, names = self.read(root)
        return split_by_rows(
            FileSource([root / p for p in paths], 3, self.image_size, self.fit),
            label,
            {"train": np.flatnonzero(train), "test": np.flatnonzero(~train)},
            names,
            str(root),
            paths=paths,
        )

    def default_train_view(self) -> Views:
        """Random crop and flip."""
        return MetricView(self.crop_size, (0.2, 1.0), mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def default_eval_view(self) -> Views:
        """Centre crop."""
        share = self.crop_size / self.image_size
        return EvalView(self.crop_size, IMAGENET_MEAN, IMAGENET_STD, center_fraction=share)


class CUBDataModule(ZeroShotBenchmark):
    """CUB-200-2011 (Wah et al. 2011): 11,788 birds; trains on the first 100 species, tests on the others.

    ``root`` is ``CUB_200_2011`` or its parent, with ``images/``, ``images.txt`` (``<id> <path>``),
    ``image_class_labels.txt`` (``<id> <class>``) and ``classes.txt`` (``<class> <name>``), ids from 1.

    Args:
        root: the unpacked folder.
        num_train_classes: how many of the first classes train.
        kwargs: see :class:`ZeroShotBenchmark` and :class:`NRMLDataModule`.
    """

    def __init__(self, root: str, num_train_classes: int = 100, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.num_train_classes = num_train_classes

    def read(self, root: Path) -> tuple[list[str], np.ndarray, np.ndarray, list[str] | None]:
        folder = "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else "."
        where = "the archive CUB_200_2011.tgz from www.vision.caltech.edu/datasets/cub_200_2011"
        images = dict(_rows(root / folder / "images.txt", 2, where))
        classes = dict(_rows(root / folder / "image_class_labels.txt", 2, where))
        names = [name for _, name in _rows(root / folder / "classes.txt", 2, where)]
        if images.keys() != classes.keys():
            odd = min(images.keys() ^ classes.keys())
            raise ValueError(f"{root}: image id {odd} is not in both images.txt and image_class_labels.txt")
        paths = [f"{folder}/images/{path}".removeprefix("./") for path in images.values()]
        label = np.asarray([int(classes[key]) - 1 for key in images])
        return paths, label, label < self.num_train_classes, names


class CarsDataModule(ZeroShotBenchmark):
    """Cars-196 (Krause et al. 2013): 16,185 cars; trains on the first 98 models, tests on the others.

    ``root`` holds ``cars_annos.mat`` and the images that it names (``car_ims/``). The archive's own
    train/test flag is not used: it divides images, not classes. Reading ``.mat`` needs SciPy, which comes
    with scikit-learn.

    Args:
        root: the unpacked folder.
        num_train_classes: how many of the first classes train.
        kwargs: see :class:`ZeroShotBenchmark` and :class:`NRMLDataModule`.
    """

    def __init__(self, root: str, num_train_classes: int = 98, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.num_train_classes = num_train_classes

    def read(self, root: Path) -> tuple[list[str], np.ndarray, np.ndarray, list[str] | None]:
        from scipy.io import loadmat  # type: ignore[import-untyped]

        file = root / "cars_annos.mat"
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}; get cars_annos.mat and car_ims.tgz of Stanford Cars")
        loaded = loadmat(file, squeeze_me=True)
        annotations = np.atleast_1d(loaded["annotations"])
        paths = [str(path) for path in annotations["relative_im_path"]]
        label = annotations["class"].astype(np.int64) - 1
        names = [str(name) for name in np.atleast_1d(loaded["class_names"])]
        return paths, label, label < self.num_train_classes, names


class SOPDataModule(ZeroShotBenchmark):
    """Stanford Online Products (Song et al. 2016): 59,551 train images of 11,318 products, 60,502 of 11,316.

    ``root`` is ``Stanford_Online_Products`` or its parent, with ``Ebay_train.txt`` and ``Ebay_test.txt``
    (header ``image_id class_id super_class_id path``).

    Args:
        root: the unpacked folder.
        kwargs: see :class:`ZeroShotBenchmark` and :class:`NRMLDataModule`.
    """

    def read(self, root: Path) -> tuple[list[str], np.ndarray, np.ndarray, list[str] | None]:
        folder = "Stanford_Online_Products" if (root / "Stanford_Online_Products").is_dir() else "."
        where = "the archive from cvgl.stanford.edu/projects/lifted_struct"
        paths, label, train = [], [], []
        for name in ("Ebay_train.txt", "Ebay_test.txt"):
            for _, class_id, _, path in _rows(root / folder / name, 4, where, header=True):
                paths.append(f"{folder}/{path}".removeprefix("./"))
                label.append(int(class_id) - 1)
                train.append(name == "Ebay_train.txt")
        return paths, np.asarray(label), np.asarray(train), None


def _rows(file: Path, columns: int, where: str, header: bool = False) -> list[list[str]]:
    """Fields of a text file separated by blanks; the last one may hold blanks itself."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; unpack {where}")
    lines = file.read_text(encoding="utf-8").splitlines()[int(header) :]
    rows = []
    for number, line in enumerate(lines, start=1 + header):
        if not line.strip():
            continue
        fields = line.split(maxsplit=columns - 1)
        if len(fields) != columns:
            raise ValueError(f"{file}, line {number}: expected {columns} fields, got {line!r}")
        rows.append(fields)
    return rows
