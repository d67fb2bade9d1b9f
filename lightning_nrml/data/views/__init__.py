"""On-device augmentation with per-sample, counter-based randomness.

Every class can stand in a configuration file by its ``class_path``; the lower-case names are the same
classes under the names that read well in Python.
"""

from lightning_nrml.data.views.base import ViewOp, Views
from lightning_nrml.data.views.color import BandJitter, ColorJitter, GaussianBlur, Grayscale, Solarize
from lightning_nrml.data.views.geometry import (
    HorizontalFlip,
    RandomAffine,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    VerticalFlip,
)
from lightning_nrml.data.views.recipes import EvalView, MetricView, eval_view, metric_view
from lightning_nrml.data.views.rng import Draws, ViewKey, counter_uniform

__all__ = [
    "BandJitter",
    "ColorJitter",
    "Draws",
    "EvalView",
    "GaussianBlur",
    "Grayscale",
    "HorizontalFlip",
    "MetricView",
    "RandomAffine",
    "RandomErasing",
    "RandomResizedCrop",
    "Resize",
    "Solarize",
    "VerticalFlip",
    "ViewKey",
    "ViewOp",
    "Views",
    "counter_uniform",
    "eval_view",
    "metric_view",
]
