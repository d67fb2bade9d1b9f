"""Noise-Robust Metric Learning for PyTorch Lightning."""

__version__ = "0.1.0"
