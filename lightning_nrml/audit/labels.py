"""Multi-label data in the audit: every label of every sample, given or not, is an entry of its own.

Entry ``i * L + c`` is label ``c`` of sample ``i``. Its classes are "without" and "with" the label, so that
table, report and review are those of single labels: an extra label is one that is given and for which
"without" is suggested, a missing one the other way round, and "noise by given class" tells of every label
how many are extra and how many are missing.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_nrml.audit.data import AuditData
from lightning_nrml.audit.scores import AuditScores
from lightning_nrml.audit.table import MARKS, class_noise, differs
from lightning_nrml.data.multilabel_writing import multilabel_frame

if TYPE_CHECKING:
    import pandas as pd


def label_entries(data: AuditData) -> AuditData:
    """The entries of multi-label data as if each were a sample with one class.

    Class ``2 c`` is "no <label c>", class ``2 c + 1`` is "<label c>"; paths are ``<path>#<label c>``.
    """
    labels, names = data.label.shape[1], label_names(data)
    images, paths = data.images, data.paths
    return replace(
        data,
        label=_codes(data.label),
        num_classes=2 * labels,
        class_names=[text for name in names for text in (f"no {name}", name)],
        paths=None if paths is None else [f"{path}#{name}" for path in paths for name in names],
        clean_label=None if data.clean_label is None else _codes(data.clean_label),
        images=None if images is None else lambda entries: images(entries // labels),
    )


def _codes(label: Tensor) -> Tensor:
    return (2 * torch.arange(label.shape[1]) + label.cpu().long()).flatten()


def entry_scores(scores: AuditScores, num_labels: int) -> AuditScores:
    """Scores of :func:`~lightning_nrml.audit.scores.audit_label_scores`, with suggestions as classes."""
    label = torch.arange(len(scores.suggested), device=scores.suggested.device) % num_labels
    return replace(scores, suggested=(scores.suggested + 2 * label).where(scores.suggested >= 0, -1))


def entries_of(rows: Tensor, num_labels: int) -> Tensor:
    """The entries ``(n * L,)`` of samples ``(n,)``."""
    return (rows.unsqueeze(1) * num_labels + torch.arange(num_labels, device=rows.device)).flatten()


def entry_columns(label: np.ndarray) -> dict[str, np.ndarray]:
    """For the audit table of labels ``(N, L)``: ``sample`` (its index), ``position`` of the label, ``kind``.

    ``kind`` is what is wrong if the entry is: ``extra`` where the label is given, ``missing`` where not.
    """
    sample, position = np.divmod(np.arange(label.size), label.shape[1])
    kind = np.where(label.ravel() > 0, "extra", "missing").astype(object)
    return {"sample": sample, "position": position, "kind": kind}


def label_rates(frame: pd.DataFrame, calibrated: bool = True) -> pd.DataFrame:
    """What is extra and missing of each label, from the audit table of the entries.

    Args:
        frame: an audit table.
        calibrated: see :func:`~lightning_nrml.audit.table.class_noise`.

    Returns:
        A row for each label: ``position``, ``label_name`` (if known), ``given`` (samples that have it),
        ``extra`` (estimated share of these that should not), ``missing`` (share of the *others* that should),
        ``suspected_extra`` and ``suspected_missing`` (counts) and, where the truth is known, ``true_extra``
        and ``true_missing``. A share of no samples is NaN.
    """
    import pandas as pd

    noise = class_noise(frame, calibrated)
    position = np.unique(frame["position"].to_numpy())
    count = frame["label"][differs(frame)].value_counts()
    kinds = (("extra", 2 * position + 1), ("missing", 2 * position))
    columns = {"position": position}
    if "label_name" in frame.columns:
        first = frame.drop_duplicates("position").set_index("position").loc[position]
        lacks = first["label"] % 2 == 0  # "no car"
        columns["label_name"] = first["label_name"].where(~lacks, first["label_name"].str[3:]).to_numpy()
    columns["given"] = noise["count"].reindex(kinds[0][1], fill_value=0).to_numpy()
    columns |= {kind: noise["wrong"].reindex(code).to_numpy() for kind, code in kinds}
    columns |= {f"suspected_{kind}": count.reindex(code, fill_value=0).to_numpy() for kind, code in kinds}
    if "clean_label" in frame.columns:
        columns |= {f"true_{kind}": noise["truth"].reindex(code).to_numpy() for kind, code in kinds}
    return pd.DataFrame(columns)


def corrected_samples(corrected: pd.DataFrame, data: AuditData) -> pd.DataFrame:
    """One row per sample with a 0/1 column for every label, from the corrected table of the entries.

    Relabelled entries are turned. A dropped one cannot be left out of such a table: it stays as given, and
    ``doubted`` names it. ``clean_known`` is there where the truth is known.
    """
    rows, labels = data.label.shape
    names = label_names(data)
    by_entry = corrected.sort_values("index")
    value = (by_entry["label"].to_numpy() % 2).reshape(rows, labels)
    dropped = (by_entry["action"] == "dropped").to_numpy().reshape(rows, labels)
    named = np.asarray(names, dtype=object)
    paths = sample_paths(data)
    key, column = (range(rows), "index") if paths is None else (paths, "path")
    table = multilabel_frame(key, value, names, column)
    table["doubted"] = [";".join(named[row]) for row in dropped]
    return table if data.clean_label is None else table.assign(clean_known=True)


def label_names(data: AuditData) -> list[str]:
    """Names of the L labels, or their numbers."""
    return data.class_names or [str(c) for c in range(data.label.shape[1])]


def sample_paths(data: AuditData) -> list[str] | None:
    """Names of the images, if they tell the samples apart."""
    paths = data.paths
    return None if paths is None or len(set(paths)) < len(paths) else paths


def reviewed_entries(review: str | os.PathLike[str], data: AuditData) -> pd.DataFrame | None:
    """The marks in a label table that a report of multi-label data saved, as rows for single entries.

    Args:
        review: CSV with ``path`` or ``index`` first, a column for each label, ``doubted`` and ``marks``, such
            as ``3:wrong 7:right`` (positions of labels).
        data: the samples.

    Returns:
        ``index`` (entry), ``label``, ``keep``, ``mark``; ``None`` if the file has no column ``marks``: it has
        a row for each entry itself.

    Raises:
        ValueError: an image, a mark or a label that is not known; names the row.
    """
    import pandas as pd

    table = pd.read_csv(review, keep_default_na=False, dtype={0: str})
    if "marks" not in table.columns:
        return None
    rows, labels = data.label.shape
    names = label_names(data)
    by_index = str(table.columns[0]).rstrip("_") == "index"
    known = {name: i for i, name in enumerate(map(str, range(rows)) if by_index else data.paths or [])}
    out = []
    for line, (name, marks) in enumerate(zip(table.iloc[:, 0], table["marks"].astype(str), strict=True)):
        for text in marks.split():
            position, _, mark = text.partition(":")
            c = int(position) if position.isdecimal() else labels
            if name not in known or c >= labels or mark not in MARKS or names[c] not in table.columns:
                raise ValueError(
                    f"review '{review}', row {line}: mark '{text}' of image '{name}' does not fit the data; "
                    "it is of another run, or was edited"
                )
            sample = known[name]
            value = int(table[names[c]].iloc[line])
            keep = mark != "wrong" or value != int(data.label[sample, c])
            out.append((sample * labels + c, 2 * c + value, keep, mark))
    return pd.DataFrame(out, columns=["index", "label", "keep", "mark"])
