"""LightningModules, one method per file."""

from lightning_nrml.modules.base import EmbeddingModule
from lightning_nrml.modules.byol import BYOL
from lightning_nrml.modules.eac import EAC
from lightning_nrml.modules.insclr import InsCLR
from lightning_nrml.modules.jocor import JoCoR
from lightning_nrml.modules.linear_probe import LinearProbe
from lightning_nrml.modules.metric_learning import MetricLearning
from lightning_nrml.modules.mochi import MoCHi
from lightning_nrml.modules.moco import MoCo
from lightning_nrml.modules.multilabel import MultiLabel
from lightning_nrml.modules.rcml import RCML
from lightning_nrml.modules.simclr import SimCLR
from lightning_nrml.modules.swav import SwAV

__all__ = [
    "BYOL",
    "EAC",
    "EmbeddingModule",
    "InsCLR",
    "JoCoR",
    "LinearProbe",
    "MetricLearning",
    "MoCHi",
    "MoCo",
    "MultiLabel",
    "RCML",
    "SimCLR",
    "SwAV",
]
