"""The ledger of multi-label data as files: what was decided about single labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_nrml.memory import LabelLedger

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("missing", "extra")


def label_frame(ledger: LabelLedger, datamodule: Any) -> pd.DataFrame:
    """Table with one row for each label of each sample, given or not, most suspicious first.

    Columns: ``rank``, ``index``, ``path`` (if known), ``label`` (its position), ``label_name``, ``given`` (0
    or 1), ``kind`` (``extra`` = it is given and may be too much, ``missing`` = it is not given and may be
    lost), ``log_p_clean`` (last score), ``mean_log_p_clean``, ``times_seen``, ``times_dropped``, ``keep``
    (False if it was dropped more often than kept) and, where the truth is known, ``clean``. The rank goes by
    the share of batches that dropped the label, then by the mean score. Words are categories: millions of
    rows stay small.
    """
    import pandas as pd

    given = datamodule.train_label.cpu().numpy()
    dropped, seen = ledger.label_dropped.cpu().numpy(), ledger.seen.cpu().numpy()
    mean = ledger.label_mean_score().cpu().numpy()
    share = dropped / seen.clip(min=1)[:, None]
    order = np.lexsort((mean.ravel(), -share.ravel()))  # NumPy sorts NaN last
    row, column = np.divmod(order, ledger.num_labels)
    columns: dict[str, Any] = {"rank": np.arange(1, len(row) + 1), "index": row}
    if datamodule.train_paths is not None:
        columns["path"] = _words(datamodule.train_paths, row)
    columns |= {
        "label": column,
        "label_name": _words(label_names(datamodule, ledger.num_labels), column),
        "given": given[row, column],
        "kind": _words(KINDS, given[row, column]),
        "log_p_clean": ledger.label_last_score.float().cpu().numpy()[row, column],
        "mean_log_p_clean": mean[row, column],
        "times_seen": seen[row],
        "times_dropped": dropped[row, column].astype(np.int64),
        "keep": ~ledger.doubted().cpu().numpy()[row, column],
    }
    clean = datamodule.train_clean_label
    if clean is not None:
        columns["clean"] = clean.cpu().numpy()[row, column]
    return pd.DataFrame(columns)


def _words(words: Sequence[str], at: np.ndarray) -> pd.Categorical:
    """``words[at]``."""
    import pandas as pd

    different, code = np.unique(np.asarray(words, dtype=object), return_inverse=True)
    return pd.Categorical.from_codes(code[at], different.tolist())


def label_names(datamodule: Any, num_labels: int) -> list[str]:
    """Names of the labels, or their positions."""
    names = getattr(datamodule, "class_names", None)
    return [str(i) for i in range(num_labels)] if names is None else list(names)


def in_words(label: torch.Tensor, names: Sequence[str]) -> list[str]:
    """The names of the labels of each sample ``(N, L)``, joined by ``;``."""
    table = np.asarray(names, dtype=object)
    return [";".join(table[row]) for row in label.cpu().numpy().astype(bool)]
