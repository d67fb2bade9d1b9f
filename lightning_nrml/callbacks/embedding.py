"""What the evaluation callbacks share: embeddings outside the training step, labels and sizes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.callbacks.evaluator import is_final
from lightning_nrml.modules.full_pass import evaluating

LabelName = Literal["given", "clean"]
LABEL_KEY: dict[LabelName, str] = {"given": "label", "clean": "clean_label"}


def embed(trainer: Trainer, pl_module: LightningModule, image: Tensor) -> Tensor:
    """``pl_module.embed(image)`` under the trainer's precision and in the weights' type, float32 ``(B, D)``.

    Raises:
        TypeError: the module has no ``embed``.
    """
    function = getattr(pl_module, "embed", None)
    if not callable(function):
        raise TypeError(
            f"{type(pl_module).__name__} has no `embed(x) -> (B, D)` method: give it one, or let its "
            "validation_step return a dict with the key 'embedding'."
        )
    if image.is_floating_point():
        image = image.to(pl_module.dtype)  # they differ for precision="bf16-true"
    with trainer.precision_plugin.forward_context():
        out: Tensor = function(image)
    return out.detach().float()


def embedding_of(trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> Tensor:
    """The embeddings that an evaluation step returned; else they are computed from the batch."""
    if isinstance(outputs, dict) and isinstance(outputs.get("embedding"), Tensor):
        found: Tensor = outputs["embedding"]
        return found.detach().float()
    with evaluating(pl_module):
        return embed(trainer, pl_module, batch["image"])


def labels_of(batch: Any, name: LabelName, owner: str) -> Tensor:
    """``(B,)`` given or clean labels of a batch.

    Raises:
        ValueError: no such labels, or several labels per image.
    """
    key = LABEL_KEY[name]
    if key not in batch:
        hint = ", which these data do not know: use label='given'" if name == "clean" else ""
        raise ValueError(f"{owner} needs '{key}' in every batch{hint}. The keys are {sorted(batch)}.")
    found: Tensor = batch[key]
    if found.ndim != 1:
        raise ValueError(
            f"{owner} needs one label per image, got labels of shape {tuple(found.shape)}; leave it out for "
            "multi-label data."
        )
    return found


def check_same_classes(trainer: Trainer, owner: str) -> None:
    """Refuse zero-shot data: neighbours or logits of other classes would be counted as wrong or at random.

    Raises:
        ValueError: validation classes do not occur in training.
    """
    splits = getattr(getattr(trainer, "datamodule", None), "splits", None)
    if getattr(splits, "zero_shot", False):
        raise ValueError(
            f"{owner} classifies into the training classes, but this data set validates on other classes: "
            "use RetrievalEvaluator here."
        )


def is_due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Whether this evaluation counts: always outside fit and in the last epoch, never in the sanity check."""
    if trainer.sanity_checking:
        return False
    if trainer.state.fn != "fit":
        return True
    return (trainer.current_epoch + 1) % every_n_epochs == 0 or is_final(trainer)


def size_of(name: str, owner: str, *places: Any) -> int:
    """The first positive int attribute ``name`` among ``places``.

    Raises:
        ValueError: none has it.
    """
    for place in places:
        value = getattr(place, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise ValueError(f"{owner} needs `{name}`: give your datamodule or LightningModule that int attribute.")


def train_set_loader(trainer: Trainer, owner: str) -> Any:
    """Batches of the train split in order, each image once over the ranks, before the evaluation view.

    Raises:
        TypeError: the datamodule has no ``embed_dataloader``.
    """
    make = getattr(getattr(trainer, "datamodule", None), "embed_dataloader", None)
    if make is None:
        raise TypeError(
            f"{owner} needs a datamodule with `embed_dataloader()`, the train split in order and without "
            "augmentation (all datamodules of lightning_nrml have one)."
        )
    return make()


def embed_train_set(
    trainer: Trainer, pl_module: LightningModule, label: LabelName, owner: str
) -> tuple[Tensor, Tensor]:
    """Embed the whole train split, un-augmented, on all ranks together.

    Args:
        trainer: its datamodule must have ``embed_dataloader()`` (the train split in order, each image
            once over the ranks).
        pl_module: asked through ``embed``, in eval mode.
        label: which labels to return.
        owner: who asks, for messages.

    Returns:
        ``(N, D)`` float32 embeddings and ``(N,)`` labels of all ranks.

    Raises:
        TypeError: the datamodule has no ``embed_dataloader``.
    """
    rows, labels = [], []
    with evaluating(pl_module):
        for batch in train_set_loader(trainer, owner):
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            labels.append(labels_of(batch, label, owner).long())
            rows.append(embed(trainer, pl_module, batch["image"]))
    device = pl_module.device
    widths = distributed.gather_sizes(rows[0].shape[1] if rows else 0, device)
    if not rows:  # more ranks than images
        rows = [torch.empty(0, max(widths), device=device)]
        labels = [torch.empty(0, dtype=torch.int64, device=device)]
    bank, sizes = distributed.gather_ragged(torch.cat(rows))
    return bank, distributed.gather(torch.cat(labels), sizes=sizes)
