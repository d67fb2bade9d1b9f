"""LightningModules, one method per file."""

from lightning_nrml.modules.base import EmbeddingModule
from lightning_nrml.modules.metric_learning import MetricLearning

__all__ = ["EmbeddingModule", "MetricLearning"]
