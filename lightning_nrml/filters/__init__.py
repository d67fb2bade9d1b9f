"""Noise filters: plain ``nn.Module``s that decide which given labels to trust."""

from lightning_nrml.filters.bare import BARE
from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.consensus import Consensus
from lightning_nrml.filters.fixed import FixedFilter
from lightning_nrml.filters.knn_vote import KNNVote
from lightning_nrml.filters.multilabel_prism import MultiLabelPRISM
from lightning_nrml.filters.prism import PRISM
from lightning_nrml.filters.small_loss import LossQuantile, SmallLoss
from lightning_nrml.filters.tsint import TSINT

__all__ = [
    "BARE",
    "PRISM",
    "TSINT",
    "Consensus",
    "FixedFilter",
    "KNNVote",
    "LossQuantile",
    "MultiLabelPRISM",
    "NoiseFilter",
    "SmallLoss",
]
