"""The decision of a noise filter on the whole training set, between two epochs."""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_nrml import distributed
from lightning_nrml.filters import NoiseFilter
from lightning_nrml.memory import FeatureBank, SampleLedger
from lightning_nrml.metrics import FilterQuality
from lightning_nrml.precision import float32_default
from lightning_nrml.types import FilterContext

_CHUNK = 8192


def add_bank(pl_module: LightningModule, num_samples: int, embedding_dim: int) -> None:
    """Give the module its ``feature_bank``, with ``drawn`` ``(N,)`` bool: what the next epoch draws."""
    bank = FeatureBank(num_samples, embedding_dim)
    bank.register_buffer("drawn", torch.ones(num_samples, dtype=torch.bool))
    pl_module.feature_bank = bank


@torch.no_grad()
@float32_default()
def decide(trainer: Trainer, pl_module: LightningModule, part: NoiseFilter, max_age: int) -> None:
    """Score the whole training set from the bank and write ``ledger.keep`` and ``bank.drawn``.

    Args:
        trainer: of the run, with a datamodule.
        pl_module: with a bank and a ledger.
        part: the filter.
        max_age: epochs after which a dropped sample is drawn again, to be judged anew; 0 = never.
    """
    bank, ledger = cast(FeatureBank, pl_module.feature_bank), cast(SampleLedger, pl_module.noise_ledger)
    label = train_label(trainer).to(bank.embedding.device)
    judged = (bank.epoch_seen >= 0) | (not part.uses_embedding)
    score = torch.full((len(label),), torch.nan, device=label.device)
    for rows in judged.nonzero(as_tuple=True)[0].split(_CHUNK):
        ctx = FilterContext(bank.embedding[rows].float(), label[rows], rows, epoch=trainer.current_epoch)
        score[rows] = part.score(ctx).float()
        suggested = part.suggest(ctx)
        if suggested is not None:
            ledger.suggested[rows] = suggested
    selection = part.select_scores(score)
    ledger.keep.copy_(selection.keep)
    ledger.last_score.copy_(torch.where(score.isnan(), ledger.last_score, score))
    drawn = selection.keep.clone()
    if max_age and part.uses_embedding:
        drawn |= trainer.current_epoch + 1 - bank.epoch_seen > max_age
    cast(Tensor, bank.drawn).copy_(drawn)


def tell_sampler(trainer: Trainer, pl_module: LightningModule) -> None:
    """Tell the datamodule which samples the next epoch draws: kept ones, and dropped ones gone stale.

    Raises:
        TypeError: its sampler obeys no mask.
    """
    target = getattr(getattr(trainer, "datamodule", None), "train_keep", None)
    if not isinstance(target, Tensor):
        raise TypeError(
            "granularity='epoch' needs a datamodule with a `train_keep` mask that its sampler obeys "
            "(all datamodules of lightning_nrml have one); use granularity='batch' with this one."
        )
    target.copy_(cast(Tensor, cast(FeatureBank, pl_module.feature_bank).drawn))
    target &= listed(trainer).to(target.device)


def release_sampler(trainer: Trainer) -> None:
    """After the run the sampler draws again what the data set has."""
    target = getattr(getattr(trainer, "datamodule", None), "train_keep", None)
    if isinstance(target, Tensor):
        target.copy_(listed(trainer))


def listed(trainer: Trainer) -> Tensor:
    """``(N,)`` bool (or 0-d, if it is all of them): what a label table has not left out for good."""
    splits = getattr(getattr(trainer, "datamodule", None), "splits", None)
    keep = getattr(getattr(splits, "train", None), "keep", None)
    return torch.tensor(True) if keep is None else torch.as_tensor(keep)


def judge(trainer: Trainer, pl_module: LightningModule, quality: FilterQuality) -> None:
    """Put the whole-set decision in force, and its scores, into a metric; each rank takes its share.

    Data without clean labels leave it as it is.
    """
    given = train_label(trainer)
    clean = getattr(trainer.datamodule, "train_clean_label", None)  # type: ignore[attr-defined]
    if not isinstance(clean, Tensor):
        return
    ledger = cast(SampleLedger, pl_module.noise_ledger)
    rows = listed(trainer).expand(len(given)).nonzero()[distributed.rank() :: distributed.world_size(), 0]
    rows = rows.to(ledger.keep.device)
    noise = (clean != given).to(ledger.keep.device)[rows]
    quality.update(ledger.keep[rows], noise, ledger.last_score[rows])


def train_label(trainer: Trainer) -> Tensor:
    """``(N,)`` labels of the training set as given.

    Raises:
        TypeError: the datamodule has none.
    """
    label = getattr(getattr(trainer, "datamodule", None), "train_label", None)
    if not isinstance(label, Tensor):
        raise TypeError(
            "granularity='epoch' and correct_labels need a datamodule with a `train_label` (N,) tensor."
        )
    return label
