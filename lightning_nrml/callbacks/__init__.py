"""Callbacks: when things happen, what is logged and what is written."""

from lightning_nrml.callbacks.filters import PRISM, KnownClean
from lightning_nrml.callbacks.noise_filter import NoiseFilterCallback
from lightning_nrml.callbacks.noise_report import NoiseReport
from lightning_nrml.callbacks.predictions import PredictionWriter
from lightning_nrml.callbacks.retrieval import RetrievalEvaluator

__all__ = [
    "PRISM",
    "KnownClean",
    "NoiseFilterCallback",
    "NoiseReport",
    "PredictionWriter",
    "RetrievalEvaluator",
]
