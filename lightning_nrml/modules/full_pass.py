"""A pass over the whole training set in the middle of training, without augmentation or gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrml import distributed
from lightning_nrml.modules.base import EmbeddingModule


@contextmanager
def evaluating(*parts: nn.Module) -> Iterator[None]:
    """All parts in eval mode without gradients; afterwards each is in the mode it had.

    ``module.train()`` would not do: it wakes batch norms that were frozen on purpose. Torch's global
    generator is put back too, since starting a loader draws from it.
    """
    modes = {part: part.training for module in parts for part in module.modules()}
    for module in parts:
        module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def embed_train_split(module: EmbeddingModule) -> Tensor:
    """Un-augmented embeddings of the train split by dataset position, from all ranks together.

    Args:
        module: attached to a trainer whose datamodule has ``embed_dataloader()`` and ``apply_views``.

    Returns:
        ``(N, D)`` float32, equal on all ranks. Images that could not be read hold NaN.
    """
    trainer = module.trainer
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    rows: list[Tensor] = []
    index: list[Tensor] = []
    with evaluating(module):
        for batch in data.embed_dataloader():
            # not through the trainer's hooks, which would augment while it trains
            image = data.apply_views({"image": batch["image"].to(module.device)}, training=False)["image"]
            with trainer.precision_plugin.forward_context():
                rows.append(module.embed(image.to(module.dtype)).float())
            index.append(batch["index"].to(module.device))
    dim = module.embedding_dim
    mine = torch.cat(rows) if rows else torch.empty(0, dim, device=module.device)
    where = torch.cat(index) if index else torch.empty(0, dtype=torch.int64, device=module.device)
    every, sizes = distributed.gather_ragged(mine)
    out = torch.full((data.num_train_samples, dim), torch.nan, device=module.device)
    out[distributed.gather(where, sizes=sizes)] = every
    return out
