"""Noise filters: plain ``nn.Module``s that decide which given labels to trust."""

from lightning_nrml.filters.base import NoiseFilter

__all__ = ["NoiseFilter"]
