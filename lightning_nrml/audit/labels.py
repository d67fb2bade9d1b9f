"""Multi-label data in the audit: every label of every sample, given or not, is an entry of its own.

Entry ``i * L + c`` is label ``c`` of sample ``i``. Its classes are "without" and "with" the label, so that
table, report and review are those of single labels: an extra label is one that is given and for which
"without" is suggested, a missing one the other way round, and "noise by given class" tells of every label
how many are extra and how many are missing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_nrml.audit.scores import AuditScores

if TYPE_CHECKING:
    import pandas as pd

    from lightning_nrml.audit.run import AuditData


def label_entries(data: AuditData) -> AuditData:
    """The entries of multi-label data as if each were a sample with one class.

    Class ``2 c`` is "no <label c>", class ``2 c + 1`` is "<label c>"; paths are ``<path>#<label c>``.
    """
    labels = data.label.shape[1]
    names = data.class_names or [str(c) for c in range(labels)]
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
    return replace(scores, suggested=scores.suggested + 2 * label)


def entries_of(rows: Tensor, num_labels: int) -> Tensor:
    """The entries ``(n * L,)`` of samples ``(n,)``."""
    return (rows.unsqueeze(1) * num_labels + torch.arange(num_labels, device=rows.device)).flatten()


def entry_columns(num_samples: int, num_labels: int) -> dict[str, np.ndarray]:
    """``sample`` (its index) and ``position`` of the label, for the audit table."""
    sample, position = np.divmod(np.arange(num_samples * num_labels), num_labels)
    return {"sample": sample, "position": position}


def corrected_samples(corrected: pd.DataFrame, data: AuditData) -> pd.DataFrame:
    """One row per sample with a 0/1 column for every label, from the corrected table of the entries.

    Relabelled entries are turned. A dropped one cannot be left out of such a table: it stays as given, and
    ``doubted`` names it.
    """
    import pandas as pd

    rows, labels = data.label.shape
    names = data.class_names or [str(c) for c in range(labels)]
    by_entry = corrected.sort_values("index")
    value = (by_entry["label"].to_numpy() % 2).reshape(rows, labels)
    dropped = (by_entry["action"] == "dropped").to_numpy().reshape(rows, labels)
    first = {"index": np.arange(rows)} if data.paths is None else {"path": data.paths}
    table = pd.DataFrame({**first, **{name: value[:, c] for c, name in enumerate(names)}})
    named = np.asarray(names, dtype=object)
    return table.assign(doubted=[";".join(named[row]) for row in dropped])
