"""Retrieval, neighbour and filter metrics: plain functions and ``torchmetrics.Metric`` classes."""

from lightning_nrml.metrics.noise import FilterQuality, filter_quality
from lightning_nrml.metrics.retrieval import RetrievalMetrics, retrieval_metrics
from lightning_nrml.metrics.search import topk_search

__all__ = ["FilterQuality", "RetrievalMetrics", "filter_quality", "retrieval_metrics", "topk_search"]
