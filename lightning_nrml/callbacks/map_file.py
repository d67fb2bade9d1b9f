"""The embedding map as files: a table of its points and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_nrml.callbacks.balanced_sample import Sample
from lightning_nrml.files import whole_file

if TYPE_CHECKING:
    import pandas as pd

_LEGEND_CLASSES = 20
_GREY = (0.8, 0.8, 0.8, 1.0)  # lighter than the grey among the colours


def map_frame(
    sample: Sample,
    xy: np.ndarray,
    class_names: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    keep: np.ndarray | None = None,
) -> pd.DataFrame:
    """One row per point; columns of what is not known are left out.

    These are ``index``, ``path``, ``label``, ``label_name``, ``clean_label``, ``keep``, ``x`` and ``y``.

    Args:
        sample: n rows.
        xy: ``(n, 2)`` coordinates.
        class_names: names by label.
        paths: names of the images by ``index``.
        keep: bool by ``index``, whether a sample is trained on.
    """
    import pandas as pd

    index, label = sample.index.cpu().numpy(), sample.label.cpu().numpy()
    columns: dict[str, Any] = {"index": index}
    if paths is not None:
        columns["path"] = [paths[i] for i in index]
    columns["label"] = label
    if class_names is not None:
        known = range(len(class_names))
        columns["label_name"] = [class_names[c] if c in known else "" for c in label]
    if sample.clean_label is not None:
        columns["clean_label"] = sample.clean_label.cpu().numpy()
    if keep is not None:
        columns["keep"] = keep[index]
    return pd.DataFrame({**columns, "x": xy[:, 0], "y": xy[:, 1]})


def class_colours(label: np.ndarray) -> dict[int, Any]:
    """A colour for each class; unlabelled rows (below 0) are grey.

    Up to 20 classes have well separated colours, which go by the label where labels are small, so that maps
    of several splits agree.
    """
    import matplotlib as mpl

    classes = [int(c) for c in np.unique(label) if c >= 0]
    if len(classes) > _LEGEND_CLASSES:
        shades = mpl.colormaps["turbo"](np.linspace(0, 1, len(classes)))
        found = {c: tuple(shade) for c, shade in zip(classes, shades, strict=True)}
    else:
        slots = classes if not classes or classes[-1] < _LEGEND_CLASSES else range(len(classes))
        palette = mpl.colormaps["tab10" if max(slots, default=0) < 10 else "tab20"]
        found = {c: palette(slot) for c, slot in zip(classes, slots, strict=True)}
    return {-1: _GREY, **found}


def draw_map(frame: pd.DataFrame, path: Path, title: str, axes: tuple[str, str] = ("", "")) -> None:
    """Write the points of :func:`map_frame` as a PNG, coloured by class.

    Points whose label is known to be wrong are crosses in the colour of the given label. The classes are
    named beside the map if there are at most 20.

    Args:
        frame: the points.
        path: ends in ``.png``; replaced as a whole.
        title: above the map.
        axes: what the axes are called.
    """
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the user's session

    label = frame["label"].to_numpy()
    colours = class_colours(label)
    colour = np.array([colours[max(int(c), -1)] for c in label])
    wrong = np.zeros(len(frame), dtype=bool)
    if "clean_label" in frame:
        wrong = (frame["clean_label"] != frame["label"]).to_numpy() & (label >= 0)
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    plot = figure.add_subplot()
    area = float(np.clip(20000 / len(frame), 9, 36))
    x, y = frame["x"].to_numpy(), frame["y"].to_numpy()
    plot.scatter(x[~wrong], y[~wrong], s=area, c=colour[~wrong], alpha=0.8, linewidths=0)
    plot.scatter(x[wrong], y[wrong], s=1.2 * area, c=colour[wrong], marker="x", linewidths=0.9)
    plot.set_aspect("equal", adjustable="datalim")  # distances mean the same in both directions
    plot.set(xticks=[], yticks=[], xlabel=axes[0], ylabel=axes[1])
    plot.set_title(title, fontsize=10, loc="left")
    _legend(plot, frame, colours, int(wrong.sum()))
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, metadata={"Software": None})


def _legend(plot: Any, frame: pd.DataFrame, colours: dict[int, Any], wrong: int) -> None:
    from matplotlib.lines import Line2D

    def entry(name: str, **style: Any) -> Any:
        name = name if len(name) <= 28 else name[:27] + "…"
        # a dollar sign would begin a formula, and names that begin with "_" would be left out
        return Line2D([], [], linestyle="", label=name.replace("$", r"\$"), **style)

    present = sorted(set(frame["label"].clip(lower=-1)))
    entries = []
    if len(present) <= _LEGEND_CLASSES:
        names = dict(zip(frame["label"], frame.get("label_name", frame["label"]), strict=True))
        for c in present:
            said = "unlabelled" if c < 0 else str(c) if str(names[c]) in ("", str(c)) else f"{c} {names[c]}"
            entries.append(entry(said, marker="o", color=colours[c]))
    if wrong:
        entries.append(entry(f"wrong label ({wrong})", marker="x", color="black"))
    if entries:
        plot.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
