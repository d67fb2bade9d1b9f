"""Is the representation alive? Spread, effective rank, alignment and uniformity, and a word on collapse."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.callbacks.embedding import embed, embedding_of, is_due
from lightning_nrml.callbacks.evaluator import SplitCallback
from lightning_nrml.metrics import alignment, embedding_std, rankme, uniformity
from lightning_nrml.modules.full_pass import evaluating


class RepresentationHealth(SplitCallback):
    """Logs label-free health of the embeddings at every validation and test, and warns once of a collapse.

    ``health/std`` in [0, 1/sqrt(D)], ``health/rankme`` in [1, D] and ``health/uniformity`` in [-8, 0] are
    those of the first ``max_samples`` images of the split; ``health/alignment`` in [0, 4] that
    of the first two views of the last training batch, embedded in eval mode (only where batches have
    ``views``). See :mod:`lightning_nrml.metrics.health` for the formulas and their sources.

    Args:
        every_n_epochs: validation epochs between two evaluations; the last epoch always counts.
        max_samples: rows that are looked at, over all ranks; the singular values cost
            min(max_samples, D)^2 x max(max_samples, D) operations.
        min_spread: warn when std x sqrt(D) falls below this; 0.1 is where two random images have a
            cosine of about 0.99.
        min_rankme: warn when RankMe falls below this.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        max_samples: int = 4096,
        min_spread: float = 0.1,
        min_rankme: float = 2.0,
    ) -> None:
        if max_samples < 2:
            raise ValueError(f"max_samples is {max_samples}: it must be 2 or more.")
        if not 0 <= min_spread <= 1:
            raise ValueError(f"min_spread is {min_spread}: it must be in [0, 1].")
        super().__init__(every_n_epochs)
        self.max_samples = max_samples
        self.min_spread, self.min_rankme = min_spread, min_rankme
        self.warned = False
        self._rows: list[Tensor] = []
        self._views: tuple[Tensor, Tensor] | None = None
        self._active = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep two views of the newest batch (a reference, not a copy)."""
        views = batch.get("views") if isinstance(batch, dict) else None
        self._views = (views[0], views[1]) if views is not None and len(views) > 1 else None

    def begin(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Start collecting."""
        self._active = is_due(trainer, self.every_n_epochs)
        self._rows = []

    def update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Collect one batch while there is room."""
        share = -(-self.max_samples // distributed.world_size())
        room = share - sum(map(len, self._rows))
        if self._active and room > 0:
            self._rows.append(embedding_of(trainer, pl_module, outputs, batch)[:room])

    def finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Compute and log ``health/*``; warn once if the embeddings have collapsed."""
        if not self._active:
            return
        values = self._alignment(trainer, pl_module)
        rows = self._gathered(pl_module.device)
        if len(rows) > 1:
            values |= {
                "std": float(embedding_std(rows)),
                "rankme": float(rankme(rows)),
                "uniformity": float(uniformity(rows)),
            }
            self._warn(values, len(rows), rows.shape[1])
        for key, value in values.items():
            pl_module.log(f"health/{key}", value, sync_dist=True)

    def _gathered(self, device: torch.device) -> Tensor:
        """``(n, D)`` rows of all ranks; a rank may have none."""
        rows, self._rows = self._rows, []
        width = max(distributed.gather_sizes(rows[0].shape[1] if rows else 0, device))
        own = torch.cat(rows) if rows else torch.empty(0, width, device=device)
        return distributed.gather_ragged(own)[0][: self.max_samples]

    def _alignment(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Mean over the pairs of all ranks, which train on equal numbers of rows."""
        views, self._views = self._views, None
        if views is None:
            return {}
        with evaluating(pl_module):
            x, y = (embed(trainer, pl_module, view) for view in views)
        return {"alignment": float(distributed.mean_over_ranks(alignment(x, y)))}

    def _warn(self, values: dict[str, float], n: int, dim: int) -> None:
        if self.warned:
            return
        spread, rank = values["std"] * math.sqrt(dim), values["rankme"]
        if spread < self.min_spread:
            what = f"every image gets nearly the same embedding (spread {spread:.3f} of 1)"
        elif rank < self.min_rankme and min(n, dim) > self.min_rankme:
            what = f"the embeddings vary along about {rank:.1f} of {dim} directions only"
        else:
            return
        self.warned = True
        rank_zero_warn(
            f"The representation has collapsed: {what}. The training loss can look fine all the same. Lower "
            "the learning rate, and check the temperature or momentum, the batch norms of the heads and that "
            "the views of an image differ."
        )
