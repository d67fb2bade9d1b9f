"""What remote-sensing datamodules share: statistics of bands, views from above, noise on several labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_nrml.data.base import NRMLDataModule
from lightning_nrml.data.multilabel_noise import apply_multilabel_noise
from lightning_nrml.data.multilabel_tables import MultiLabelTable, read_multilabel_table, read_scores
from lightning_nrml.data.noise_types import NoisyLabels
from lightning_nrml.data.raster import cached_statistics
from lightning_nrml.data.splits import Split
from lightning_nrml.data.views import EvalView, MetricView, Views

STATISTICS_FOLDER = "~/.cache/lightning_nrml"
BandStatistics = tuple[tuple[float, ...], tuple[float, ...]]


class RemoteSensing(NRMLDataModule):
    """Default views that flip both ways and normalise each band.

    Args:
        normalize: use the statistics of the bands in the default views.
        statistics_folder: where computed statistics (and indexes) are kept.
        kwargs: see :class:`NRMLDataModule`.
    """

    def __init__(
        self, normalize: bool = True, statistics_folder: str = STATISTICS_FOLDER, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.normalize, self.statistics_folder = normalize, statistics_folder
        self._statistics: BandStatistics | None = None

    @property
    def statistics(self) -> BandStatistics:
        """Mean and standard deviation of every band over the train images, in the units that views see."""
        if self._statistics is None:
            self._statistics = cached_statistics(self.splits.train.images, Path(self.statistics_folder))
        return self._statistics

    def default_train_view(self) -> Views:
        """Flips both ways, which keep every label of an image from above, and normalisation."""
        mean, std = self.statistics if self.normalize else (None, None)
        return MetricView(self.view_size, crop_scale=None, flip=0.5, vertical_flip=0.5, mean=mean, std=std)

    def default_eval_view(self) -> Views:
        """Normalisation."""
        mean, std = self.statistics if self.normalize else (None, None)
        return EvalView(self.view_size, mean, std)


class MultiLabelRemoteSensing(RemoteSensing):
    """Several labels per image, with the noise of :mod:`lightning_nrml.data.multilabel_noise`.

    A subclass's :meth:`load_splits` sets ``_label_names``.

    Args:
        kwargs: see :class:`RemoteSensing`; ``m_per_class`` and ``epoch_length`` need single labels.
    """

    #: column of the names of images in tables; ``None`` = the first
    image_column: str | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.m_per_class is not None:
            raise ValueError("m_per_class needs one class per sample; leave it out for multi-label data")
        self._label_names: list[str] = []

    def read_table(self, path: Path) -> MultiLabelTable:
        """The table that ``noise.table`` names: images in the first column, then a 0/1 column per label."""
        return read_multilabel_table(path)

    def inject_noise(self, train: Split, num_classes: int) -> NoisyLabels:
        """Noisy train labels: from the generators, by ``noise.scores``, or from ``noise.table``."""
        assert train.paths is not None
        if self.noise.table is None:
            scores = None
            if self.noise.scores is not None:
                file = Path(self.noise.scores).expanduser()
                scores = read_scores(file, train.paths, self._label_names, self.image_column)
            return apply_multilabel_noise(train.label, self.noise, self._label_names, scores)
        table = Path(self.noise.table).expanduser()
        if not table.is_file():
            raise FileNotFoundError(f"no label table {table}; check noise")
        noisy = self.read_table(table)
        names = self._label_order(noisy)
        position, absent = {image: row for row, image in enumerate(noisy.images)}, set(self._absent)
        lost = [image for i, image in enumerate(train.paths) if image not in position and i not in absent]
        if lost:
            raise ValueError(
                f"noise.table {noisy.source} has no row for {len(lost)} of {len(train)} train images, the "
                f"first is '{lost[0]}'"
            )
        label = train.label.copy()
        there = [i for i, image in enumerate(train.paths) if image in position]
        label[there] = noisy.label[[position[train.paths[i]] for i in there]][:, names]
        return NoisyLabels(label, train.label, label != train.label, known=noisy.clean_known)

    def _label_order(self, table: MultiLabelTable) -> list[int]:
        """Positions of this set's labels among the table's."""
        own, names = self._label_names, table.names
        if sorted(own) != sorted(names):
            odd = sorted(set(own) ^ set(names)) or ["a label twice"]
            raise ValueError(
                f"noise.table {table.source} has other labels than the data set: {', '.join(odd[:5])}"
            )
        return [names.index(name) for name in own]
