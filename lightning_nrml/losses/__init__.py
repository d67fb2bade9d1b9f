"""Losses: one per file, fp32 inside, sample weights, right under DDP."""

from lightning_nrml.losses.base import Loss
from lightning_nrml.losses.byol import BYOLLoss
from lightning_nrml.losses.combined import CombinedLoss
from lightning_nrml.losses.contrastive import ContrastiveLoss, CrossBatchContrastiveLoss
from lightning_nrml.losses.eac import EACLoss
from lightning_nrml.losses.insclr import InsCLRLoss
from lightning_nrml.losses.margin import DistanceWeightedMiner, MarginLoss
from lightning_nrml.losses.mochi import MoCHiLoss
from lightning_nrml.losses.multilabel import MultiLabelASLLoss, MultiLabelBCELoss, MultiLabelLoss
from lightning_nrml.losses.multilabel_jocor import MultiLabelJoCoRLoss
from lightning_nrml.losses.multilabel_targets import MultiLabelELRLoss, MultiLabelSATLoss
from lightning_nrml.losses.ntxent import NTXentLoss
from lightning_nrml.losses.pml import PMLLoss
from lightning_nrml.losses.rcml import RCMLLoss
from lightning_nrml.losses.softmax import CosineSoftmaxLoss
from lightning_nrml.losses.supcon import SupConLoss
from lightning_nrml.losses.swav import SwAVLoss, sinkhorn

__all__ = [
    "BYOLLoss",
    "CombinedLoss",
    "ContrastiveLoss",
    "CosineSoftmaxLoss",
    "CrossBatchContrastiveLoss",
    "DistanceWeightedMiner",
    "EACLoss",
    "InsCLRLoss",
    "Loss",
    "MarginLoss",
    "MoCHiLoss",
    "MultiLabelASLLoss",
    "MultiLabelBCELoss",
    "MultiLabelELRLoss",
    "MultiLabelJoCoRLoss",
    "MultiLabelLoss",
    "MultiLabelSATLoss",
    "NTXentLoss",
    "PMLLoss",
    "RCMLLoss",
    "SupConLoss",
    "SwAVLoss",
    "sinkhorn",
]
