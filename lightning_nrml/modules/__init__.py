"""LightningModules, one method per file."""

from lightning_nrml.modules.base import EmbeddingModule
from lightning_nrml.modules.jocor import JoCoR
from lightning_nrml.modules.metric_learning import MetricLearning
from lightning_nrml.modules.multilabel import MultiLabel
from lightning_nrml.modules.rcml import RCML

__all__ = ["EmbeddingModule", "JoCoR", "MetricLearning", "MultiLabel", "RCML"]
