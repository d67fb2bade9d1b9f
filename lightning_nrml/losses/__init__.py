"""Losses: one per file, fp32 inside, sample weights, right under DDP."""

from lightning_nrml.losses.base import Loss
from lightning_nrml.losses.contrastive import ContrastiveLoss, CrossBatchContrastiveLoss

__all__ = ["ContrastiveLoss", "CrossBatchContrastiveLoss", "Loss"]
