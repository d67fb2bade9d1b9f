"""One HTML file that shows the most suspicious samples; it needs no network and no server.

The page holds a limited number of samples, thumbnails, classes and pairs, whatever the size of the data
set; only the given labels of all samples (a few bytes each, up to a million) are in it, so that it can save
a whole label table.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_nrml.audit.neighbours import Neighbours
from lightning_nrml.audit.table import class_noise, clean_known, differs
from lightning_nrml.files import write_text

if TYPE_CHECKING:
    import pandas as pd

#: rows (int64) -> uint8 (n, C, H, W), one row of images each
Images = Callable[[np.ndarray], np.ndarray]

TEMPLATE = Path(__file__).with_name("report.html")
_ALL_LABELS, _ALL_PATHS = 1_000_000, 50_000
_HASHED = 2**18  # rows at a time
_CLASSES, _PAIRS, _MATRIX, _BINS, _CURVE = 200, 60, 20, 40, 200
_SIDE, _SMALL = 96, 48


@dataclass
class ReportFacts:
    """What the page says beside the table.

    Args:
        title: heading.
        facts: rows of "run facts": what was audited, with what.
        noise_rate: estimated share of wrong labels; NaN = none.
        calibrated: ``log_p_clean`` holds real probabilities (not a filter's relative scores).
        neighbours: index -> its nearest trusted samples as ``(index, cosine)``.
        labels: labels of each sample, of multi-label data: the table's rows are its entries then (see
            :mod:`lightning_nrml.audit.labels`), and so are ``neighbours``. 1 = one class per sample.
        sample_paths: names of the images, so that the page can save a label table that says them.
    """

    title: str = "Label audit"
    facts: dict[str, str] = field(default_factory=dict)
    noise_rate: float = float("nan")
    calibrated: bool = True
    neighbours: Neighbours = field(default_factory=dict)
    labels: int = 1
    sample_paths: list[str] | None = None


def write_report(
    path: Path,
    frame: pd.DataFrame,
    facts: ReportFacts,
    images: Images | None = None,
    class_names: Sequence[str] | None = None,
    gallery: int = 200,
    rows: int = 1000,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file.
        frame: an audit table, most suspicious first.
        facts: see :class:`ReportFacts`.
        images: gives pixels by sample index; ``None`` = no thumbnails.
        class_names: names by class id.
        gallery: samples with thumbnails, with their neighbours.
        rows: samples in the page at all, at least ``gallery``.

    Returns:
        ``path``.
    """
    data = page_data(frame, facts, images, class_names, gallery, rows)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text)
    write_text(path, page)
    return path


def page_data(
    frame: pd.DataFrame,
    facts: ReportFacts,
    images: Images | None,
    class_names: Sequence[str] | None,
    gallery: int,
    rows: int,
) -> dict[str, Any]:
    """What the page's script reads, as plain JSON values."""
    shown = shown_rows(frame, max(rows, gallery))
    thumbs, small = ({}, False) if images is None else _thumbnails(shown_rows(frame, gallery), facts, images)
    label_by_index = frame[["index", "label"]].set_index("index")["label"].sort_index()
    records = _records(shown, facts, label_by_index)
    curve = _curve(frame)
    labels = label_by_index.to_numpy()
    whole = len(labels) <= _ALL_LABELS and int(label_by_index.index[-1]) == len(labels) - 1
    many, paths = facts.labels > 1, facts.sample_paths
    named = whole and paths is not None and len(paths) <= _ALL_PATHS
    wide = many and whole and (paths is None or named)
    return {
        "id": f"{_identity(frame, images)}-{len(labels)}",
        "title": facts.title,
        "tiles": _tiles(frame, facts, curve),
        "facts": [[k, str(v)] for k, v in facts.facts.items()],
        "names": None if class_names is None else [str(n) for n in class_names],
        "calibrated": facts.calibrated,
        "known": clean_known(frame),
        "total": len(frame),
        "rows": records,
        "thumbs": thumbs,
        "pixelated": small,
        "each": facts.labels,
        "wide": wide,
        "paths": paths if named else None,
        "classes": _classes(frame, facts.calibrated, facts.labels),
        **_confusion(frame, matrix=not many),
        "hist": _histogram(frame, facts.calibrated),
        "pr": curve,
        "labels": ",".join(map(str, labels.tolist())) if whole else None,
    }


def _identity(frame: pd.DataFrame, images: Images | None) -> str:
    """Names a data set, so that a browser keeps the marks of each apart: its labels and names of images.

    Labels alone would not do: sets of equally many images per class have the same. Where images have no
    names, pixels of a few of them stand for all.
    """
    from pandas.util import hash_pandas_object

    columns = [c for c in ("label", "label_name", "path") if c in frame.columns]
    order, found = np.argsort(frame["index"].to_numpy()), hashlib.sha256()
    for start in range(0, len(order), _HASHED):
        part = frame[columns].iloc[order[start : start + _HASHED]]
        found.update(hash_pandas_object(part, index=False).to_numpy().tobytes())
    if "path" not in columns and images is not None:
        some = np.linspace(0, len(frame) - 1, min(len(frame), 16)).astype(np.int64)
        for pixels in images(some):
            found.update(np.ascontiguousarray(pixels).tobytes())
    return found.hexdigest()[:12]


def shown_rows(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    """The first rows; of multi-label data also what else is suspected of the same samples."""
    judged = frame["log_p_clean"].notna().to_numpy()  # no copies of millions of rows
    chosen = np.zeros(len(frame), dtype=bool)
    chosen[np.flatnonzero(judged)[:rows]] = True
    if "sample" in frame.columns:
        chosen |= judged & (differs(frame) & frame["sample"].isin(frame["sample"][chosen])).to_numpy()
    return frame[chosen]


def _number(value: Any, digits: int = 4) -> float | None:
    return round(float(value), digits) if np.isfinite(value) else None


def _records(shown: pd.DataFrame, facts: ReportFacts, label: pd.Series) -> list[dict[str, Any]]:
    epochs = sorted((c for c in shown.columns if c.startswith("epoch_")), key=lambda c: int(c[6:]))
    out = []
    for row in shown.to_dict("records"):
        index = int(row["index"])
        record: dict[str, Any] = {
            "index": index,
            "rank": int(row["rank"]),
            "label": int(row["label"]),
            "sugg": int(row["suggested_label"]),
            "lp": _number(row["log_p_clean"]),
        }
        optional = {"path": "path", "confidence": "conf", "clean_label": "truth"}
        optional |= {"times_seen": "seen", "times_dropped": "drop"}
        for column, key in optional.items():
            if column in row:
                value = row[column]
                record[key] = str(value) if key == "path" else _number(value) if key == "conf" else int(value)
        if epochs:
            record["hist"] = [_number(row[c], 2) for c in epochs]
        near = facts.neighbours.get(index, [])
        record["near"] = [[int(i), int(label.loc[i]), round(float(s), 2)] for i, s in near]
        out.append(record)
    return out


def _thumbnails(shown: pd.DataFrame, facts: ReportFacts, images: Images) -> tuple[dict[str, str], bool]:
    """Data URIs by sample index, decoded 64 at a time; and whether the images are tiny."""
    each = facts.labels
    suspects = (shown["index"] // each).unique().tolist()
    around = (facts.neighbours.get(int(s), []) for s in shown["index"])
    near = {i // each for found in around for i, _ in found} - set(suspects)
    found: dict[str, str] = {}
    pixelated = False
    for indices, side in ((suspects, _SIDE), (sorted(near), _SMALL)):
        for start in range(0, len(indices), 64):
            chunk = np.asarray(indices[start : start + 64], dtype=np.int64)
            for index, pixels in zip(chunk.tolist(), images(chunk * each), strict=True):
                found[str(index)] = thumbnail(pixels, side)
                pixelated |= max(pixels.shape[1:]) <= 40
    return found, pixelated


def thumbnail(pixels: np.ndarray, side: int = _SIDE) -> str:
    """A data URI of an image, at most ``side`` wide and high.

    Args:
        pixels: uint8 ``(C, H, W)``; of more than three bands the first three are shown.
        side: pixels; smaller images stay as they are.
    """
    from PIL import Image

    bands = pixels[:1] if len(pixels) < 3 else pixels[:3]
    image = Image.fromarray(bands[0] if len(bands) == 1 else np.ascontiguousarray(bands.transpose(1, 2, 0)))
    image.thumbnail((side, side))
    kind = "png" if max(image.size) <= 40 else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 80} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _tiles(frame: pd.DataFrame, facts: ReportFacts, curve: dict[str, Any] | None) -> list[list[str]]:
    tiles = [["samples", f"{len(frame) // facts.labels:,}"]]
    if facts.labels == 1:
        tiles.append(["classes", f"{frame['label'].nunique():,}"])
    else:
        tiles.append(["labels of each", f"{facts.labels:,}"])
    if np.isfinite(facts.noise_rate):
        tiles.append(["estimated wrong labels", f"{facts.noise_rate:.1%}"])
    differ = frame[differs(frame)]
    if facts.labels == 1:
        tiles.append(["another class suggested", f"{len(differ):,}"])
    else:
        extra = int((differ["label"] % 2).sum())
        tiles.append(["suspected missing + extra", f"{len(differ) - extra:,} + {extra:,}"])
    if curve is not None:
        tiles.append(["really wrong (truth known)", f"{curve['rate']:.1%}"])
        tiles.append(["AUROC of the ranking", f"{curve['auroc']:.3f}"])
    return tiles


def _classes(frame: pd.DataFrame, calibrated: bool, labels: int) -> list[list[Any]]:
    """``[class, samples, estimated noise, true noise]`` of the noisiest classes."""
    table = class_noise(frame, calibrated)
    worst = table["wrong"].groupby(table.index // 2 if labels > 1 else table.index).transform("max")
    table = table.assign(worst=worst).sort_values("worst", ascending=False, kind="stable")
    table = table.head(_CLASSES * (2 if labels > 1 else 1))
    return [
        [int(c), int(n), _number(w), _number(t)]
        for c, n, w, t in zip(table.index, table["count"], table["wrong"], table["truth"], strict=True)
    ]


def _confusion(frame: pd.DataFrame, matrix: bool) -> dict[str, Any]:
    """The commonest pairs given -> suggested where they differ; if wanted, the matrix for few classes."""
    given, suggested = frame["label"].to_numpy(), frame["suggested_label"].to_numpy()
    differ = differs(frame).to_numpy()
    pairs, count = np.unique(np.stack([given[differ], suggested[differ]], 1), axis=0, return_counts=True)
    top = np.argsort(-count, kind="stable")[:_PAIRS]
    size = int(max(given.max(), suggested.max())) + 1
    square = None
    if matrix and size <= _MATRIX:
        square = np.zeros((size, size), dtype=np.int64)
        square[pairs[:, 0], pairs[:, 1]] = count
    return {
        "pairs": [[*pairs[i].tolist(), int(count[i])] for i in top],
        "matrix": None if square is None else square.tolist(),
    }


def _histogram(frame: pd.DataFrame, calibrated: bool) -> dict[str, Any]:
    """Counts of P_clean (of the score, if that is no probability), and of really wrong ones in each bin."""
    columns = [c for c in ("log_p_clean", "label", "clean_label") if c in frame.columns]
    judged = frame.loc[frame["log_p_clean"].notna(), columns]
    score = judged["log_p_clean"].to_numpy(dtype=np.float64)
    if not len(score):
        return {"count": [], "low": "", "high": "", "wrong": None}
    score = np.exp(score) if calibrated else score
    low, high = (0.0, 1.0) if calibrated else (float(np.quantile(score, 0.002)), float(score.max()))
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    score = score.clip(edges[0], edges[-1])
    count = np.histogram(score, edges)[0].tolist()
    wrong = None
    if "clean_label" in judged.columns:
        wrong = np.histogram(score[(judged["clean_label"] != judged["label"]).to_numpy()], edges)[0].tolist()
    return {"count": count, "wrong": wrong, "low": f"{edges[0]:.3g}", "high": f"{edges[-1]:.3g}"}


def _curve(frame: pd.DataFrame) -> dict[str, Any] | None:
    """Precision and recall of "the top-ranked are wrong", thinned to some 200 points; None without truth."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if "clean_label" not in frame.columns:
        return None
    wrong = (frame["clean_label"] != frame["label"]).to_numpy()
    if not wrong.any() or wrong.all():
        return None
    hits, suspicion = wrong.cumsum(), -frame["rank"].to_numpy()
    at = np.unique(np.linspace(0, len(wrong) - 1, _CURVE).astype(np.int64))
    points = [[round(float(hits[i] / hits[-1]), 4), round(float(hits[i] / (i + 1)), 4)] for i in at]
    return {
        "points": points,
        "auroc": float(roc_auc_score(wrong, suspicion)),
        "ap": float(average_precision_score(wrong, suspicion)),
        "rate": float(wrong.mean()),
    }
