"""What ``nrml predict`` leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.files import whole_file, write_frame

KEYS = ("embedding", "index", "label", "probability")


class PredictionCollector(Callback):
    """Gathers the embeddings of a predict run over the ranks, in the order of ``index``.

    Reads what ``predict_step`` returns: a dict with ``embedding`` and ``index``, and ``label`` and
    ``probability`` if there are any.

    Attributes:
        arrays: after the run, on rank 0: ``embedding`` ``(N, D)``, ``index`` ``(N,)``, ``label`` if known.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._parts: dict[str, list[Tensor]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._parts = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect one batch.

        Raises:
            TypeError: the module's ``predict_step`` returns something else.
        """
        if not isinstance(outputs, dict) or not {"embedding", "index"} <= outputs.keys():
            raise TypeError(
                f"{type(pl_module).__name__}.predict_step must return a dict with 'embedding' and 'index' "
                f"for {type(self).__name__}; extend EmbeddingModule, or write your own callback."
            )
        for key in KEYS:
            if key in outputs:
                self._parts.setdefault(key, []).append(outputs[key].detach().cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather over the ranks."""
        # a rank without rows takes its shapes from rank 0, which has the first ones
        shapes = {key: (part[0].shape[1:], part[0].dtype) for key, part in self._parts.items()}
        columns = {}
        for key, (shape, dtype) in distributed.broadcast(shapes).items():
            rows = torch.cat([torch.empty((0, *shape), dtype=dtype), *self._parts.get(key, [])])
            columns[key] = distributed.gather_ragged(rows.to(pl_module.device))[0]
        self._parts = {}
        if not columns or not trainer.is_global_zero:
            return
        order = columns["index"].argsort(stable=True)
        self.arrays = {key: value[order].cpu().numpy() for key, value in columns.items()}


class PredictionWriter(PredictionCollector):
    """Writes the embeddings of a predict run and a table that says whose they are.

    ``embeddings.npy`` is float32 ``(N, D)``; row i of ``index.parquet`` (columns ``index``, ``label``,
    ``probability`` and ``path`` where they are known) tells which image row i belongs to. Rows are in the
    order of ``index``; those of all ranks are gathered. Reads what ``predict_step`` returns: a dict with
    ``embedding`` and ``index``, and ``label`` and ``probability`` if there are any.

    Args:
        folder: where to write; default ``predict`` in the trainer's ``default_root_dir``.
        faiss: also write ``embeddings.faiss``, an index of cosines, as faiss' ``index_factory`` describes it
            (``"Flat"``, ``"HNSW32"``, ``"IVF256,Flat"``); ``None`` = no index.
    """

    def __init__(self, folder: str | None = None, faiss: str | None = None) -> None:
        super().__init__()
        self.folder, self.faiss = folder, faiss

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew; an index that faiss cannot build is told before anything is embedded."""
        super().on_predict_start(trainer, pl_module)
        if self.faiss is not None:
            cosine_index(self.faiss, getattr(pl_module, "embedding_dim", None) or 64)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather over the ranks and write, on rank 0."""
        super().on_predict_end(trainer, pl_module)
        arrays, self.arrays = self.arrays, {}
        if not arrays:
            return
        folder = Path(self.folder or Path(trainer.default_root_dir, "predict"))
        paths = getattr(getattr(trainer, "datamodule", None), "predict_paths", None)
        write_predictions(folder, arrays, paths)
        if self.faiss is not None:
            write_index(folder / "embeddings.faiss", arrays["embedding"], self.faiss)
        count, size = arrays["embedding"].shape
        index = "" if self.faiss is None else ", search index: embeddings.faiss"
        rank_zero_info(
            f"{count} embeddings of {size} numbers: {folder / 'embeddings.npy'} (rows: index.parquet{index})"
        )


def write_predictions(folder: Path, arrays: dict[str, np.ndarray], paths: list[str] | None = None) -> None:
    """``embeddings.npy`` and ``index.parquet`` in ``folder``; each appears whole or not at all.

    Args:
        folder: made if it is missing.
        arrays: ``embedding`` ``(N, D)``, ``index`` ``(N,)`` and, if known, ``label`` ``(N,)`` or ``(N, L)``
            and ``probability`` ``(N, L)``.
        paths: name of the image at each ``index``.
    """
    import pandas as pd

    columns: dict[str, Any] = {"index": arrays["index"]}
    if "label" in arrays:
        label = arrays["label"]
        columns["label"] = label if label.ndim == 1 else label.tolist()
    if "probability" in arrays:
        columns["probability"] = arrays["probability"].tolist()
    if paths is not None:
        columns["path"] = [paths[i] for i in arrays["index"]]
    with whole_file(folder / "embeddings.npy") as part:
        np.save(part, arrays["embedding"].astype(np.float32, copy=False))
    write_frame(folder / "index.parquet", pd.DataFrame(columns))


def cosine_index(factory: str, dim: int) -> Any:
    """An empty faiss index of inner products.

    Raises:
        ImportError: faiss is not installed.
        ValueError: faiss does not know the description.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("a search index needs faiss-cpu or faiss-gpu; or set faiss to null") from error
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"faiss cannot build the index '{factory}' for {dim} numbers: give one that its index_factory "
            "knows, such as Flat, HNSW32 or IVF256,Flat"
        ) from error


def write_index(path: Path, embedding: np.ndarray, factory: str) -> None:
    """A faiss index of the rows ``(N, D)``, brought to unit length; row numbers are the answers.

    Raises:
        ValueError: faiss cannot build it for so many numbers, or of so few rows.
    """
    index = cosine_index(factory, embedding.shape[1])
    import faiss

    rows = np.array(embedding, dtype=np.float32, order="C")
    faiss.normalize_L2(rows)
    try:
        if not index.is_trained:
            index.train(rows)
        index.add(rows)
    except RuntimeError as error:
        why = str(error).rpartition("failed: ")[2]  # before it stands where in faiss
        raise ValueError(
            f"faiss cannot build the index '{factory}' of {len(rows)} rows ({why}): give one with fewer "
            "cells, or Flat"
        ) from error
    with whole_file(path) as part:
        faiss.write_index(index, str(part))
