"""Losses: one per file, fp32 inside, sample weights, right under DDP."""

from lightning_nrml.losses.base import Loss
from lightning_nrml.losses.byol import BYOLLoss
from lightning_nrml.losses.contrastive import ContrastiveLoss, CrossBatchContrastiveLoss
from lightning_nrml.losses.mochi import MoCHiLoss
from lightning_nrml.losses.ntxent import NTXentLoss
from lightning_nrml.losses.pml import PMLLoss
from lightning_nrml.losses.softmax import CosineSoftmaxLoss
from lightning_nrml.losses.supcon import SupConLoss

__all__ = [
    "BYOLLoss",
    "ContrastiveLoss",
    "CosineSoftmaxLoss",
    "CrossBatchContrastiveLoss",
    "Loss",
    "MoCHiLoss",
    "NTXentLoss",
    "PMLLoss",
    "SupConLoss",
]
