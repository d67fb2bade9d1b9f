"""Multi-label remote-sensing images with a label table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import SAMPLESPERPIXEL, TiffImageFile

from lightning_nrml.data.multilabel_tables import (
    MultiLabelTable,
    find_images,
    read_multilabel_table,
    split_rows,
)
from lightning_nrml.data.raster import RasterSource
from lightning_nrml.data.remote_sensing import MultiLabelRemoteSensing
from lightning_nrml.data.sources import FileSource, ImageSource
from lightning_nrml.data.splits import SPLIT_NAMES, Split, Splits


class MultiLabelRSDataModule(MultiLabelRemoteSensing):
    """Images (RGB, or rasters of any bands) and a table with a 0/1 column for every label.

    As it stands it reads UC Merced's multi-label layout: ``LandUse_Multilabeled.txt`` (tab separated, names
    without suffix), ``Images/<scene>/<name>.<suffix>`` and ``split_train.txt``, ``split_val.txt``,
    ``split_test.txt``. A CSV or Parquet table may have a column ``split`` instead of lists. JPEG, PNG and
    TIFFs of three 8-bit bands without a nodata value are read as RGB; other TIFFs, and all of them if
    ``bands`` is given, through rasterio (extra ``rs``) as float32 in their own units. The first image of a
    split tells which.

    Noise is put on the train labels only; see :mod:`lightning_nrml.data.multilabel_noise`. ``noise.table``
    is a table like this one, with the labels of all train images. Batches carry ``clean_label`` and the flip
    mask ``is_noise`` then.

    Default views flip in both directions and normalise by the mean and deviation of each band of the train
    images, which are computed once and kept on disk. There are no crops: they may cut off what a label stands
    for, which is additive noise.

    Args:
        path: folder of the data set.
        table: label table, relative to ``path``.
        images: folder of the images, relative to ``path``.
        splits: file with image names for each of ``train``, ``val``, ``test``, relative to ``path``; default:
            the table's column, or ``split_<name>.txt`` where it has none.
        image_column: column of the image names; default the first.
        label_columns: columns of the labels, in this order; default all that are left.
        split_column: column of the splits.
        image_size: side of the square that images are resized to (aspect ignored); ``None`` keeps the stored
            size, which must then be the same for all.
        bands: numbers of the bands to read, from 1, in this order; default all.
        kwargs: ``normalize`` and ``statistics_folder``, see :class:`RemoteSensing`, and those of
            :class:`NRMLDataModule`; ``m_per_class`` and ``epoch_length`` need single labels.
    """

    def __init__(
        self,
        path: str,
        table: str = "LandUse_Multilabeled.txt",
        images: str = "Images",
        splits: dict[str, str] | None = None,
        image_column: str | None = None,
        label_columns: list[str] | None = None,
        split_column: str = "split",
        image_size: int | None = 256,
        bands: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.table, self.images_folder = Path(path).expanduser(), table, images
        self.split_files = splits
        self.image_column, self.label_columns, self.split_column = image_column, label_columns, split_column
        self.image_size, self.bands = image_size, bands

    def load_splits(self) -> Splits:
        table = self.read_table(self.path / self.table)
        self._label_names = table.names
        rows = split_rows(table, self._lists(table.split is not None))
        files = [str(f) for f in find_images(table.images, self.path / self.images_folder)]
        parts = {
            name: Split(
                self._source([files[i] for i in at]), table.label[at], paths=[table.images[i] for i in at]
            )
            for name, at in rows.items()
        }
        return Splits(parts["train"], parts.get("test"), len(table.names), parts.get("val"), table.names)

    def read_table(self, path: Path) -> MultiLabelTable:
        """A table like the data set's own."""
        return read_multilabel_table(path, self.image_column, self.label_columns, self.split_column)

    def _lists(self, has_column: bool) -> dict[str, Path] | None:
        if self.split_files is not None:
            return {name: self.path / file for name, file in self.split_files.items()}
        if has_column:
            return None
        usual = {name: self.path / f"split_{name}.txt" for name in SPLIT_NAMES}
        return {name: file for name, file in usual.items() if file.is_file()} or None

    def _source(self, files: Sequence[str]) -> ImageSource:
        return image_source(files, self.bands, self.image_size)


def image_source(files: Sequence[str], bands: Sequence[int] | None, image_size: int | None) -> ImageSource:
    """Pictures as 8-bit RGB, rasters in their own units; without ``bands`` the first file tells which.

    Args:
        files: one per image.
        bands: numbers of the bands to read, from 1, in this order; ``None`` = all.
        image_size: side of the square that images are resized to; ``None`` keeps the stored size.
    """
    if bands is None and _is_rgb(files):
        return FileSource(files, 3, image_size, "squash")
    return RasterSource(files, bands, image_size)


#: GDAL's tag of TIFF for the nodata value
_NODATA = 42113


@contextmanager
def _silent() -> Iterator[None]:
    """Without the error that Pillow logs of TIFFs of many bands, which are read by other means."""
    log = logging.getLogger(TiffImagePlugin.__name__)
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _is_rgb(files: Sequence[str]) -> bool:
    """Whether the first file that is there is a picture: of a TIFF, 8-bit RGB (or a palette) and no more."""
    for file in files:
        if Path(file).is_file():
            try:
                with _silent(), Image.open(file) as image:
                    if isinstance(image, TiffImageFile):
                        tags = image.tag_v2
                        rgb = (image.mode == "RGB" and tags.get(SAMPLESPERPIXEL) == 3) or image.mode == "P"
                        return rgb and _NODATA not in tags
                    return image.mode not in ("I", "F") and not image.mode.startswith("I;")
            except (UnidentifiedImageError, OSError):
                return Path(file).suffix.lower() not in (".tif", ".tiff")
    return True
