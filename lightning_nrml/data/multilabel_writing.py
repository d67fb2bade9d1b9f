"""Tables of images and label columns, as :mod:`lightning_nrml.data.multilabel_tables` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_nrml.data.multilabel_tables import REMARKS, check_once
from lightning_nrml.files import write_frame

if TYPE_CHECKING:
    import pandas as pd


def check_label_names(names: Sequence[str], source: str | Path) -> None:
    """Refuse a label twice, and one that is called like a remark: a table could not hold them all."""
    columns = [*names, *REMARKS]
    twice = [name for name in names if columns.count(name) > 1]
    if twice:
        raise ValueError(f"{source} would have two columns '{twice[0]}'; rename the label")


def multilabel_frame(
    key: Sequence[Any], label: np.ndarray, names: Sequence[str], column: str
) -> pd.DataFrame:
    """What :func:`read_multilabel_table` reads, as a frame without remarks.

    Args:
        key: N names of images (or numbers of samples), each once.
        label: ``(N, L)``, 0 or 1.
        names: L names of labels, each once.
        column: what to call the first column; ``_`` is appended while a label has that name.
    """
    import pandas as pd

    while column in names:
        column += "_"
    frame = pd.DataFrame(label.astype(np.uint8), columns=list(names))
    frame.insert(0, column, list(key))
    return frame


def write_multilabel_table(
    path: Path, images: Sequence[str], label: np.ndarray, names: Sequence[str], clean_known: bool = False
) -> None:
    """Write what :func:`read_multilabel_table` reads, at once.

    Args:
        path: ``.csv`` or ``.parquet``; missing folders are made.
        images: N names of images, each once.
        label: ``(N, L)``, 0 or 1.
        names: L names of labels, each once.
        clean_known: say in a column that the labels which the table replaces are the truth.

    Raises:
        ValueError: an image or a label twice, or a label with the name of a remark; nothing is written then.
    """
    check_once(images, path)
    check_label_names(names, path)
    frame = multilabel_frame(images, label, names, "image")
    write_frame(path, frame.assign(clean_known=True) if clean_known else frame)
