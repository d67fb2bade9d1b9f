"""Backbones, heads and layers."""

from lightning_nrml.models.backbone import create_backbone, load_weights
from lightning_nrml.models.heads import create_head
from lightning_nrml.models.momentum import MomentumTeacher, cosine_tau
from lightning_nrml.models.small import ConvNet

__all__ = ["ConvNet", "MomentumTeacher", "cosine_tau", "create_backbone", "create_head", "load_weights"]
