"""Callbacks: when things happen, what is logged and what is written."""

from lightning_nrml.callbacks.filters import (
    BARE,
    PRISM,
    Consensus,
    KNNVote,
    KnownClean,
    LossQuantile,
    MultiLabelPRISM,
    SmallLoss,
)
from lightning_nrml.callbacks.health import RepresentationHealth
from lightning_nrml.callbacks.knn import OnlineKNN
from lightning_nrml.callbacks.multilabel import MultiLabelEvaluator
from lightning_nrml.callbacks.noise_filter import NoiseFilterCallback
from lightning_nrml.callbacks.noise_report import NoiseReport
from lightning_nrml.callbacks.predictions import PredictionWriter
from lightning_nrml.callbacks.probe import OnlineLinearProbe
from lightning_nrml.callbacks.projection import EmbeddingMap
from lightning_nrml.callbacks.retrieval import RetrievalEvaluator
from lightning_nrml.callbacks.tsint import TSINT

__all__ = [
    "BARE",
    "Consensus",
    "EmbeddingMap",
    "KNNVote",
    "KnownClean",
    "LossQuantile",
    "MultiLabelEvaluator",
    "MultiLabelPRISM",
    "NoiseFilterCallback",
    "NoiseReport",
    "OnlineKNN",
    "OnlineLinearProbe",
    "PRISM",
    "PredictionWriter",
    "RepresentationHealth",
    "RetrievalEvaluator",
    "SmallLoss",
    "TSINT",
]
