"""BigEarthNet: half a million Sentinel-2 and Sentinel-1 patches with several land-cover labels each."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lightning_nrml.data.bigearthnet_classes import STATISTICS, Nomenclature, bands_of, class_names
from lightning_nrml.data.bigearthnet_index import (
    V1_FOLDERS,
    V2_FOLDERS,
    PatchList,
    PatchTable,
    crawl_v1,
    find_rows,
    read_list,
    read_patch_table,
    rows_of_lists,
)
from lightning_nrml.data.bigearthnet_source import GeoTiffStore, LMDBStore, PatchSource, PatchStore, Resample
from lightning_nrml.data.remote_sensing import BandStatistics, MultiLabelRemoteSensing
from lightning_nrml.data.splits import SPLIT_NAMES, Split, Splits

Version = Literal["auto", "v1", "v2"]
# of patches that the official lists leave out, as they are called in the archive
_SNOW_AND_CLOUD = ("patches_with_seasonal_snow.csv", "patches_with_cloud_and_shadow.csv")
_V2_SNOW_AND_CLOUD = "metadata_for_patches_with_snow_cloud_or_shadow.parquet"
_LAYOUTS = (
    "v1 has BigEarthNet-v1.0/ (and BigEarthNet-S1-v1.0/) with lists of splits, v2 has metadata.parquet and "
    "BigEarthNet-S2/ (and BigEarthNet-S1/), or an LMDB"
)


class BigEarthNetDataModule(MultiLabelRemoteSensing):
    """BigEarthNet v1 (590,326 patches, 43 or 19 classes) and v2 = reBEN (549,488 patches, 19 classes).

    Layouts, as unpacked:

    * v1: ``BigEarthNet-v1.0/<patch>/<patch>_<band>.tif`` and ``..._labels_metadata.json``,
      ``BigEarthNet-S1-v1.0/...``, and lists ``bigearthnet-{train,val,test}.csv`` or ``{train,val,test}.csv``
      with one patch per line (its Sentinel-1 partner after a comma, if you like). The JSON files are read
      once; the table made of them is kept in ``statistics_folder``.
    * v2: ``metadata.parquet``, ``BigEarthNet-S2/<tile>/<patch>/<patch>_<band>.tif``, ``BigEarthNet-S1/...``.
    * ``lmdb``: patch name -> safetensors of planes instead of GeoTIFFs, which is what several GPUs need.

    Images are float32 ``(bands, 120, 120)``: Sentinel-2 in counts (reflectance x 10,000), Sentinel-1 in dB,
    not rounded. Channels come in the order of ``bands``; in the sets, bands go by wavelength (B8A after B08)
    and VV before VH. Neither images nor files are touched to build the index; patches without any label in
    the nomenclature are left out, as in the official lists.

    Noise, its tables and batches are those of :class:`MultiLabelRSDataModule`; a table's first column holds
    Sentinel-2 names.

    Args:
        path: folder of the archive.
        nomenclature: 19 classes, or v1's 43.
        bands: ``s2`` (12), ``s2_10m_20m`` (10), ``rgb``, ``s1`` (VV, VH), ``both`` (14), or a list of names.
        version: ``auto`` goes by what lies in the folder.
        splits: list file for each of ``train``, ``val``, ``test``, relative to ``path``; default: the lists
            above, or the table's column.
        exclude: list files of further patches to leave out, relative to ``path``.
        keep_snow_and_cloud: keep patches under snow, clouds and shadow. By default they are left out: v1 by
            the archive's two lists if they lie in the folder, v2 by its table.
        countries: keep patches of these only, by the table's column ``country``.
        metadata: table of patches and label names, relative to ``path``; v1 then reads no JSON files.
        lmdb: LMDB of the images, relative to ``path``.
        resample: how bands of 20 and 60 m get 120 x 120 pixels. Papers differ, and scores move a little.
        band_statistics: ``published`` (v1, all patches) or ``train``: computed from all train images, which
            takes as long as reading them, and kept.
        kwargs: ``normalize`` and ``statistics_folder``, see :class:`RemoteSensing`, and those of
            :class:`NRMLDataModule`; ``m_per_class`` and ``epoch_length`` need single labels.
    """

    def __init__(
        self,
        path: str,
        nomenclature: Nomenclature = 19,
        bands: str | list[str] = "s2",
        version: Version = "auto",
        splits: dict[str, str] | None = None,
        exclude: list[str] | None = None,
        keep_snow_and_cloud: bool = False,
        countries: list[str] | None = None,
        metadata: str = "metadata.parquet",
        lmdb: str | None = None,
        resample: Resample = "bilinear",
        band_statistics: Literal["published", "train"] = "published",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, accepted in (
            ("nomenclature", nomenclature, get_args(Nomenclature)),
            ("version", version, get_args(Version)),
            ("resample", resample, get_args(Resample)),
            ("band_statistics", band_statistics, ("published", "train")),
        ):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(map(str, accepted))}, got {value!r}")
        self.path = Path(path).expanduser()
        self.nomenclature, self.bands, self._version = nomenclature, bands_of(bands), version
        self.split_files, self.exclude = splits, exclude or []
        self.keep_snow_and_cloud, self.countries = keep_snow_and_cloud, countries
        self.metadata, self.lmdb = self.path / metadata, None if lmdb is None else self.path / lmdb
        self.resample: Resample = resample
        self.band_statistics = band_statistics
        self._label_names = class_names(nomenclature)

    @property
    def num_classes(self) -> int:
        """19 or 43; nothing is read for it."""
        return int(self.nomenclature)

    @property
    def in_channels(self) -> int:
        """Number of bands; nothing is read for it."""
        return len(self.bands)

    @property
    def version(self) -> int:
        """1 or 2, from the folder if it was not given.

        Raises:
            FileNotFoundError: the folder has neither layout.
            ValueError: 43 classes are wanted of v2.
        """
        found = self._version
        if found == "auto":
            if any((self.path / name).is_dir() for name in V1_FOLDERS.values()):
                found = "v1"
            elif self.metadata.is_file() or any((self.path / name).is_dir() for name in V2_FOLDERS.values()):
                found = "v2"
            else:
                raise FileNotFoundError(f"no BigEarthNet in {self.path}: {_LAYOUTS}")
        if found == "v2" and self.nomenclature == 43:
            raise ValueError("BigEarthNet v2 has 19 classes only: set nomenclature to 19")
        return 1 if found == "v1" else 2

    @property
    def sensors(self) -> tuple[str, ...]:
        """``s2`` and ``s1``, as far as their bands are read."""
        radar = [band in ("VV", "VH") for band in self.bands]
        return (*(() if all(radar) else ("s2",)), *(("s1",) if any(radar) else ()))

    def prepare_data(self) -> None:
        """Read the JSON files of v1 in one process per machine; the others find the table."""
        if self.version == 1 and not self.metadata.is_file():
            self._crawl(self._lists())

    def load_splits(self) -> Splits:
        lists = self._lists()
        table = self._patches(lists)
        keep = self._kept(table)
        store = self._store()
        parts: dict[str, Split] = {}
        for name, at in self._rows(table, lists).items():
            names = {"s2": table.s2[at]}
            if "s1" in self.sensors:
                names["s1"] = self._partners(table, lists, name, at)
            labelled = table.label[at].any(1)
            chosen, empty = keep[at] & labelled, keep[at] & ~labelled
            if len(at) and not chosen.any():
                raise ValueError(self._nothing_left(table, name, len(at)))
            if empty.any():
                warnings.warn(
                    f"left out {int(empty.sum())} {name} patches that have none of the {self.nomenclature} "
                    f"classes, such as {names['s2'][empty][0].decode()}",
                    stacklevel=2,
                )
            names = {sensor: value[chosen] for sensor, value in names.items()}
            images = PatchSource(store, names, self.bands, self.resample)
            label = table.label[at[chosen]].astype(np.int64)
            parts[name] = Split(images, label, paths=[raw.decode() for raw in names["s2"]])
        test, val = parts.get("test"), parts.get("val")
        return Splits(parts["train"], test, self.num_classes, val, list(self._label_names))

    @property
    def statistics(self) -> BandStatistics:
        """Mean and standard deviation of every band, in counts and dB."""
        if self.band_statistics == "train":
            return super().statistics
        mean, std = zip(*(STATISTICS[band] for band in self.bands), strict=True)
        return tuple(mean), tuple(std)

    def _store(self) -> PatchStore:
        return GeoTiffStore(self.path, self.version) if self.lmdb is None else LMDBStore(self.lmdb)

    def _lists(self) -> dict[str, PatchList] | None:
        """The lists that were given, else v1's usual ones; ``None`` = the table tells."""
        if self.split_files is not None:
            return {name: read_list(self.path / file) for name, file in self.split_files.items()}
        for pattern in ("bigearthnet-{}.csv", "{}.csv") if self.version == 1 else ():
            usual = {name: self.path / pattern.format(name) for name in SPLIT_NAMES}
            if usual["train"].is_file():
                return {name: read_list(file) for name, file in usual.items() if file.is_file()}
        return None

    def _patches(self, lists: dict[str, PatchList] | None) -> PatchTable:
        """All patches with labels."""
        if self.version == 1:
            if self.metadata.is_file():
                return self._read(self.metadata, 43)
            return replace(self._read(self._crawl(lists), 43), source=f"the JSON files in {self.path}")
        table = self._read(self.metadata, 19)
        more = self.path / _V2_SNOW_AND_CLOUD
        wanted = self.keep_snow_and_cloud and more.is_file()
        return table.joined(self._read(more, 19)) if wanted else table

    def _read(self, file: Path, source: Nomenclature) -> PatchTable:
        return read_patch_table(file, self.nomenclature, source, self.keep_snow_and_cloud, self.countries)

    def _crawl(self, lists: dict[str, PatchList] | None) -> Path:
        paired = lists is not None and all(given.s1 is not None for given in lists.values())
        only_s1 = not (self.path / V1_FOLDERS["s2"]).is_dir()
        sensor = "s1" if only_s1 or ("s1" in self.sensors and not paired) else "s2"
        return crawl_v1(self.path, sensor, Path(self.statistics_folder))

    def _kept(self, table: PatchTable) -> np.ndarray:
        """``(N,)`` bool, False for patches on the lists of those to be left out."""
        usual = [] if self.keep_snow_and_cloud else [n for n in _SNOW_AND_CLOUD if (self.path / n).is_file()]
        keep = table.keep.copy()
        for name in [*usual, *self.exclude]:
            rows = find_rows(table, read_list(self.path / name).s2)
            if name in self.exclude and not (rows >= 0).any():
                warnings.warn(
                    f"exclude: none of the {len(rows)} patches in {self.path / name} is in {table.source}: "
                    "it leaves nothing out; a list has Sentinel-2 names",
                    stacklevel=2,
                )
            keep[rows[rows >= 0]] = False
        return keep

    def _nothing_left(self, table: PatchTable, split: str, patches: int) -> str:
        left_out = [f"those outside countries {self.countries}"] if self.countries is not None else []
        left_out += [f"those in exclude {self.exclude}"] if self.exclude else []
        if not self.keep_snow_and_cloud:
            left_out.append("those under snow, clouds or shadow (keep_snow_and_cloud false)")
        left_out.append(f"those with none of the {self.nomenclature} classes")
        return (
            f"{table.source}: none of {patches} {split} patches is left, for these are left out: "
            f"{', '.join(left_out)}; change one of these settings, or the splits"
        )

    def _rows(self, table: PatchTable, lists: dict[str, PatchList] | None) -> dict[str, np.ndarray]:
        if lists is not None:
            return rows_of_lists(table, lists)
        if table.split is None:
            raise ValueError(
                f"{table.source} has no column 'split', and there is no list bigearthnet-train.csv or "
                f"train.csv in {self.path}; name yours in splits"
            )
        rows = {name: np.flatnonzero(table.split == name) for name in SPLIT_NAMES}
        return {name: at for name, at in rows.items() if name == "train" or len(at)}

    def _partners(
        self, table: PatchTable, lists: dict[str, PatchList] | None, split: str, rows: np.ndarray
    ) -> np.ndarray:
        """Sentinel-1 names of ``rows``, which are all of a split in its order."""
        listed = None if lists is None else lists[split].s1
        if listed is not None:
            return listed
        if table.s1 is None:
            raise ValueError(
                f"{table.source} does not tell the Sentinel-1 partners of its patches; add a column s1_name, "
                "or use lists with two columns"
            )
        return table.s1[rows]
