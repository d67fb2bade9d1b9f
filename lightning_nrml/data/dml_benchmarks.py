"""The usual zero-shot benchmarks of metric learning, read from their official file layouts."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.decode import Fit
from lightning_nrml.data.sources import FileSource
from lightning_nrml.data.splits import Splits, split_by_rows
from lightning_nrml.data.views import EvalView, MetricView, Views

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# what SciPy raises on damaged .mat files, beside its own error, and NumPy on other content
_BROKEN = (LookupError, NotImplementedError, OSError, TypeError, ValueError, zlib.error)


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
        images, classes, names = (
            _by_id(_rows(root / folder / f"{name}.txt", 2, where))
            for name in ("images", "image_class_labels", "classes")
        )
        if images.keys() != classes.keys():
            odd = min(images.keys() ^ classes.keys())
            raise ValueError(f"{root}: image id {odd} is not in both images.txt and image_class_labels.txt")
        paths = [f"{folder}/images/{row.fields[1]}".removeprefix("./") for row in images.values()]
        position = {number: place for place, number in enumerate(sorted(names))}
        label = []
        for key in images:
            number = classes[key].number(1, "class")
            if number not in position:
                raise ValueError(f"{classes[key]}: class {number} is not in {root / folder / 'classes.txt'}")
            label.append(position[number])
        train = np.asarray(label) < self.num_train_classes
        return paths, np.asarray(label), train, [names[number].fields[1] for number in position]


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
        from scipy.io.matlab import MatReadError  # type: ignore[import-untyped]

        file = root / "cars_annos.mat"
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}; get cars_annos.mat and car_ims.tgz of Stanford Cars")
        try:
            loaded = loadmat(file, squeeze_me=True)
            annotations = np.atleast_1d(loaded["annotations"])
            paths = [str(path) for path in annotations["relative_im_path"]]
            label = annotations["class"].astype(np.int64) - 1
            names = [str(name) for name in np.atleast_1d(loaded["class_names"])]
        except (MatReadError, *_BROKEN) as error:
            raise ValueError(
                f"{file} cannot be read ({type(error).__name__}: {error}); it must be the cars_annos.mat of "
                "Stanford Cars, with class_names and annotations, which have 'relative_im_path' and 'class'"
            ) from error
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
            for row in _rows(root / folder / name, 4, where, header=True):
                paths.append(f"{folder}/{row.fields[3]}".removeprefix("./"))
                label.append(row.number(1, "class") - 1)
                train.append(name == "Ebay_train.txt")
        return paths, np.asarray(label), np.asarray(train), None


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of a text file; as text it says where it stands."""

    file: Path
    line: int
    fields: list[str]

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"

    def number(self, column: int, name: str) -> int:
        """A field that must be a whole number from 1."""
        text = self.fields[column]
        if not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"{self}: the {name} must be a number from 1, got '{text}'")
        return int(text)


def _rows(file: Path, columns: int, where: str, header: bool = False) -> list[_Row]:
    """The lines of a text file, by fields separated by blanks; the last one may hold blanks itself."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; unpack {where}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}); unpack {where}") from error
    rows = [
        _Row(file, i, line.strip().split(maxsplit=columns - 1))
        for i, line in enumerate(lines, 1)
        if line.strip()
    ]
    if header and rows and rows[0].fields[0].isdecimal():
        first = lines[rows[0].line - 1]
        raise ValueError(f"{rows[0]}: this must be the header, got {first!r}; unpack {where}")
    for row in rows[header:]:
        if len(row.fields) != columns:
            raise ValueError(f"{row}: expected {columns} fields, got {lines[row.line - 1]!r}")
    return rows[header:]


def _by_id(rows: list[_Row]) -> dict[int, _Row]:
    """Rows by the number in their first field, which each has for itself."""
    found: dict[int, _Row] = {}
    for row in rows:
        first = found.setdefault(row.number(0, "id"), row)
        if first is not row:
            raise ValueError(
                f"{row}: id {row.fields[0]} stands in line {first.line} already; keep one of them"
            )
    return found
