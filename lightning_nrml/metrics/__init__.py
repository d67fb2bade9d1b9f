"""Metrics of retrieval, neighbours, clusters, multi-label classifiers and filters."""

from lightning_nrml.metrics.accuracy import TopKAccuracy
from lightning_nrml.metrics.clustering import nmi_ami
from lightning_nrml.metrics.health import alignment, embedding_std, rankme, uniformity
from lightning_nrml.metrics.knn import KNNClassifier
from lightning_nrml.metrics.multilabel import MultiLabelMetrics, multilabel_metrics
from lightning_nrml.metrics.noise import FilterQuality, filter_quality
from lightning_nrml.metrics.retrieval import RetrievalMetrics, retrieval_metrics
from lightning_nrml.metrics.search import ExactIndex, topk_search

__all__ = [
    "ExactIndex",
    "FilterQuality",
    "KNNClassifier",
    "MultiLabelMetrics",
    "RetrievalMetrics",
    "TopKAccuracy",
    "alignment",
    "embedding_std",
    "filter_quality",
    "multilabel_metrics",
    "nmi_ami",
    "rankme",
    "retrieval_metrics",
    "topk_search",
    "uniformity",
]
