"""Noise filters: plain ``nn.Module``s that decide which given labels to trust."""

from lightning_nrml.filters.base import NoiseFilter
from lightning_nrml.filters.consensus import Consensus
from lightning_nrml.filters.fixed import FixedFilter
from lightning_nrml.filters.prism import PRISM

__all__ = ["PRISM", "Consensus", "FixedFilter", "NoiseFilter"]
