"""Which patches BigEarthNet has, with labels and splits, in compact arrays: no image is opened.

v2 comes with a table (``metadata.parquet``). v1 has a JSON file beside every patch: these are read once and
kept as a table of the same columns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_nrml.data.bigearthnet_classes import Nomenclature, class_ids
from lightning_nrml.data.splits import SPLIT_NAMES
from lightning_nrml.data.tables import booleans
from lightning_nrml.files import read_lines, whole_file

if TYPE_CHECKING:
    import pyarrow as pa

V1_FOLDERS = {"s2": "BigEarthNet-v1.0", "s1": "BigEarthNet-S1-v1.0"}
V2_FOLDERS = {"s2": "BigEarthNet-S2", "s1": "BigEarthNet-S1"}
_JSON = "_labels_metadata.json"
_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}
# JSON files read at a time: they are tiny, so a slow disk or a network decides
_THREADS, _CHUNK = 8, 8192


@dataclass(frozen=True, slots=True)
class PatchTable:
    """All patches of an archive, as fixed-width arrays (about 150 bytes a patch, 19 labels included).

    Args:
        source: the file, for messages.
        s2: ``(N,)`` bytes, names of the Sentinel-2 patches, each once.
        label: ``(N, L)`` uint8, 0 or 1.
        keep: ``(N,)`` bool, False = a known patch that is not wanted.
        order: ``(N,)`` int64 that sorts ``s2``: half a million names are sorted once only.
        s1: ``(N,)`` bytes, names of the Sentinel-1 partners, if they are known.
        split: ``(N,)`` train, val or test, if the table tells.
    """

    source: str
    s2: np.ndarray
    label: np.ndarray
    keep: np.ndarray
    order: np.ndarray
    s1: np.ndarray | None = None
    split: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.s2)

    def joined(self, other: PatchTable) -> PatchTable:
        """Both tables; optional columns stay where both have them.

        Raises:
            ValueError: a patch is in both.
        """
        s2 = np.concatenate([self.s2, other.s2])
        order = np.argsort(s2, kind="stable")
        twice = first_duplicate(s2, order)
        if twice is not None:
            raise ValueError(
                f"patch '{s2[twice[0]].decode()}' is both in {self.source} and in {other.source}"
            )
        both = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("label", "keep", "s1", "split")
            if getattr(self, name) is not None and getattr(other, name) is not None
        }
        return PatchTable(f"{self.source} and {other.source}", s2, order=order, **both)


def read_patch_table(
    path: Path,
    nomenclature: Nomenclature,
    source: Nomenclature,
    keep_snow_and_cloud: bool = False,
    countries: Sequence[str] | None = None,
) -> PatchTable:
    """Read a table with the columns ``patch_id`` and ``labels`` (lists of names), such as v2's.

    Args:
        path: Parquet file. Used if they are there: ``s1_name``, ``split`` (train, validation, test),
            ``contains_seasonal_snow``, ``contains_cloud_or_shadow``, ``country``.
        nomenclature: the label columns that are wanted.
        source: the nomenclature that the names in the file belong to.
        keep_snow_and_cloud: ``keep`` rows whose ``contains_`` columns are true, too.
        countries: ``keep`` patches of these only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not Parquet, a missing column, an unknown label, split or country, or a patch in two rows;
            names file and row (from 0).
    """
    columns = _read_columns(path)
    s2 = _names(columns["patch_id"], path, "patch_id")
    order = np.argsort(s2, kind="stable")
    twice = first_duplicate(s2, order)
    if twice is not None:
        raise ValueError(
            f"{path}: patch '{s2[twice[0]].decode()}' stands in rows {twice[0]} and {twice[1]}; keep one row "
            "per patch"
        )
    label = _multi_hot(columns["labels"], s2, path, nomenclature, source)
    s1 = _names(columns["s1_name"], path, "s1_name") if "s1_name" in columns else None
    split = _split_column(columns["split"], s2, path) if "split" in columns else None
    keep = np.ones(len(s2), dtype=bool)
    for name in ("contains_seasonal_snow", "contains_cloud_or_shadow"):
        if name in columns and not keep_snow_and_cloud:
            keep &= ~_booleans(columns[name], path, name)
    if countries is not None:
        keep &= _in_countries(columns, path, countries)
    return PatchTable(str(path), s2, label, keep, order, s1, split)


def _read_columns(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"no table {path} of patches; check path and metadata")
    wanted = (
        "patch_id",
        "labels",
        "s1_name",
        "split",
        "country",
        "contains_seasonal_snow",
        "contains_cloud_or_shadow",
    )
    try:
        there = pq.read_schema(path).names
        missing = [name for name in wanted[:2] if name not in there]
        if missing:
            raise ValueError(f"there is no column '{missing[0]}', its columns are {', '.join(there)}")
        table = pq.read_table(path, columns=[name for name in wanted if name in there])
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a table of patches: {error}") from error
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    if not len(table):
        raise ValueError(f"{path} has no rows")
    if not (pa.types.is_list(columns["labels"].type) or pa.types.is_large_list(columns["labels"].type)):
        raise ValueError(f"{path}, column 'labels' holds {columns['labels'].type}, not lists of names")
    return columns


def _names(column: pa.Array, path: Path, name: str) -> np.ndarray:
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"{path}, column '{name}', row {row}: empty")
    return np.asarray(column.to_pylist(), dtype=np.bytes_)


def _booleans(column: pa.Array, path: Path, name: str) -> np.ndarray:
    """A column of true/false or 1/0, also in words; missing values are false."""
    marked = column.to_pandas()
    return booleans(str(path), name, marked.where(marked.notna(), False))


def _multi_hot(
    column: pa.Array, s2: np.ndarray, path: Path, nomenclature: Nomenclature, source: Nomenclature
) -> np.ndarray:
    import pyarrow.compute as pc

    given = column.flatten()
    row = pc.list_parent_indices(column).to_numpy()
    if given.null_count:
        at = row[np.argmax(given.is_null().to_numpy(zero_copy_only=False))]
        raise ValueError(
            f"{path}, column 'labels', row {at} ({s2[at].decode()}): a label is empty; remove it from the "
            "list, or name it"
        )
    coded = given.dictionary_encode()
    names = coded.dictionary.to_pylist()
    ids = class_ids(names, nomenclature, source)
    code = coded.indices.to_numpy(zero_copy_only=False)
    found = ids[code.astype(np.int64)] if len(code) else np.empty(0, dtype=np.int64)
    if (found == -2).any():
        at = int(np.argmax(found == -2))
        raise ValueError(
            _unknown_label(f"{path}, row {row[at]} ({s2[row[at]].decode()})", names[code[at]], source)
        )
    label = np.zeros((len(s2), nomenclature), dtype=np.uint8)
    label[row[found >= 0], found[found >= 0]] = 1
    return label


def _unknown_label(where: str, name: str, source: Nomenclature) -> str:
    version = "v1" if source == 43 else "v2"
    return f"{where}: label '{name}' is not among the {source} classes of BigEarthNet {version}"


def _split_column(column: pa.Array, s2: np.ndarray, path: Path) -> np.ndarray:
    coded = column.dictionary_encode()
    names = coded.dictionary.to_pylist()
    code = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    known = np.asarray([_SPLITS.get(str(name), "") for name in [*names, None]])
    split: np.ndarray = known[code]
    if (split == "").any():
        row = int(np.argmax(split == ""))
        given = "empty" if code[row] < 0 else repr(names[code[row]])
        raise ValueError(
            f"{path}, column 'split', row {row} ({s2[row].decode()}): {given}; a split is train, "
            "validation or test"
        )
    return split


def _in_countries(columns: Mapping[str, Any], path: Path, countries: Sequence[str]) -> np.ndarray:
    if "country" not in columns:
        raise ValueError(f"{path} has no column 'country'; leave out countries, or give lists in splits")
    there = columns["country"].unique().to_pylist()
    unknown = [name for name in countries if name not in there]
    if unknown:
        accepted = ", ".join(sorted(map(str, there)))
        raise ValueError(f"{path} has no patch of '{unknown[0]}'; its countries are {accepted}")
    return np.isin(np.asarray(columns["country"].to_pylist(), dtype=np.str_), list(countries))


def first_duplicate(names: np.ndarray, order: np.ndarray | None = None) -> tuple[int, int] | None:
    """Positions of the first name that occurs again, and of where it does; ``None`` if all differ.

    Args:
        names: ``(n,)`` bytes.
        order: what sorts them, if it is known.
    """
    order = np.argsort(names, kind="stable") if order is None else order
    same = np.flatnonzero(names[order[1:]] == names[order[:-1]])
    if not len(same):
        return None
    at = same[np.argmin(order[same + 1])]
    return int(order[at]), int(order[at + 1])


def find_rows(table: PatchTable, names: np.ndarray) -> np.ndarray:
    """Row of every Sentinel-2 name in the table, ``(len(names),)`` int64; -1 = it has none."""
    place = np.minimum(np.searchsorted(table.s2, names, sorter=table.order), len(table) - 1)
    row = table.order[place]
    return np.where(table.s2[row] == names, row, -1)


def crawl_v1(root: Path, sensor: str, cache: Path) -> Path:
    """Read the JSON file of every patch of a v1 archive, once, into a Parquet table.

    Args:
        root: folder that holds ``BigEarthNet-v1.0`` and ``BigEarthNet-S1-v1.0``.
        sensor: ``"s2"``, or ``"s1"``, whose files name their partner, too.
        cache: folder for the table. It is made anew when patches come or go, not when a JSON file is edited:
            delete it then.

    Returns:
        The table, with ``patch_id``, ``labels`` and, from ``"s1"``, ``s1_name``.

    Raises:
        FileNotFoundError: there is no such folder, or a patch without its JSON file.
        ValueError: a file that is no such JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = root / V1_FOLDERS[sensor]
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; check path, or bands, which ask for {sensor}")
    key = repr((str(folder.resolve()), folder.stat().st_mtime_ns, sensor))
    file = cache.expanduser() / f"bigearthnet_{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"
    if file.is_file():
        return file
    with os.scandir(folder) as entries:
        patches = sorted(entry.name for entry in entries if entry.is_dir())
    if not patches:
        raise FileNotFoundError(f"no patches in {folder}")
    words: dict[str, str] = {}  # so that 43 names are held, not millions
    partner: list[str] = []
    labels: list[list[str]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(patches), _CHUNK):
            for content in pool.map(
                lambda name: _read_json(folder, name, sensor), patches[start : start + _CHUNK]
            ):
                labels.append([words.setdefault(name, name) for name in content["labels"]])
                if sensor == "s1":
                    partner.append(content["corresponding_s2_patch"])
    columns = {"patch_id": partner, "s1_name": patches} if sensor == "s1" else {"patch_id": patches}
    table = pa.table({**columns, "labels": pa.array(labels, pa.list_(pa.string()))})
    with whole_file(file) as part:
        pq.write_table(table, part)
    return file


def _read_json(folder: Path, patch: str, sensor: str) -> dict[str, Any]:
    file = folder / patch / f"{patch}{_JSON}"
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"patch {patch} has no {file}; mend or remove its folder") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    keys = ("labels", "corresponding_s2_patch") if sensor == "s1" else ("labels",)
    lost = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lost:
        raise ValueError(f"{file} has no key '{lost[0]}'")
    unknown = class_ids(content["labels"], 43, 43) == -2
    if unknown.any():
        raise ValueError(_unknown_label(str(file), content["labels"][int(np.argmax(unknown))], 43))
    return dict(content)


@dataclass(frozen=True, slots=True)
class PatchList:
    """Names in a list file: ``(n,)`` bytes, with Sentinel-1 partners where the file has a second column."""

    file: Path
    s2: np.ndarray
    s1: np.ndarray | None


def read_list(file: Path) -> PatchList:
    """A file with a patch per line, ``<Sentinel-2 name>`` or ``<Sentinel-2 name>,<Sentinel-1 name>``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of another form, or a patch twice; names file and line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no list {file} of patches")
    lines = read_lines(file)
    while lines and not lines[-1]:
        lines.pop()
    cells = [line.split(",") for line in lines]
    width = len(cells[0]) if cells else 1
    for number, row in enumerate(cells, 1):
        if len(row) != width or width > 2 or not all(row) or not lines[number - 1].isascii():
            raise ValueError(
                f"{file}, line {number}: {lines[number - 1]!a}; a line is <Sentinel-2 name>, or <Sentinel-2 "
                "name>,<Sentinel-1 name>, the same in all lines, in ASCII"
            )
    s2 = np.asarray([row[0] for row in cells], dtype=np.bytes_)
    twice = first_duplicate(s2)
    if twice is not None:
        raise ValueError(
            f"{file}: patch '{s2[twice[0]].decode()}' stands in lines {twice[0] + 1} and {twice[1] + 1}"
        )
    return PatchList(file, s2, np.asarray([row[1] for row in cells], dtype=np.bytes_) if width == 2 else None)


def rows_of_lists(table: PatchTable, lists: Mapping[str, PatchList]) -> dict[str, np.ndarray]:
    """Rows of the table by split.

    Raises:
        ValueError: an unknown split, no train split, an empty list, a patch in two splits, or one that the
            table does not have; names file and line.
    """
    unknown = [name for name in lists if name not in SPLIT_NAMES]
    if unknown or "train" not in lists:
        lack = f"'{unknown[0]}' is no split" if unknown else "there is no train split"
        raise ValueError(f"splits: {lack}; accepted are {', '.join(SPLIT_NAMES)}")
    owner = np.full(len(table), -1, dtype=np.int8)
    rows: dict[str, np.ndarray] = {}
    for number, (name, given) in enumerate(lists.items()):
        if not len(given.s2):
            raise ValueError(f"{given.file} names no patch: the {name} split is empty")
        found = find_rows(table, given.s2)
        lost = found < 0
        if lost.any():
            at = int(np.argmax(lost))
            raise ValueError(
                f"{given.file}, line {at + 1}: patch '{given.s2[at].decode()}' ({int(lost.sum())} such) is "
                f"not in {table.source}"
            )
        taken = owner[found] >= 0
        if taken.any():
            at = int(np.argmax(taken))
            other = list(lists)[owner[found[at]]]
            raise ValueError(
                f"{given.file}, line {at + 1}: patch '{given.s2[at].decode()}' is in the {other} split "
                f"already ({int(taken.sum())} such); a patch belongs to one split"
            )
        owner[found] = number
        rows[name] = found
    return rows
