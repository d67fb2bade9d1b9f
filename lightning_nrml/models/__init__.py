"""Backbones, heads and layers."""

from lightning_nrml.models.backbone import create_backbone
from lightning_nrml.models.heads import create_head, projector
from lightning_nrml.models.momentum import MomentumTeacher, cosine_tau
from lightning_nrml.models.small import ConvNet
from lightning_nrml.models.weights import export_backbone, load_backbone, load_weights

__all__ = [
    "ConvNet",
    "MomentumTeacher",
    "cosine_tau",
    "create_backbone",
    "create_head",
    "export_backbone",
    "load_backbone",
    "load_weights",
    "projector",
]
