"""On-device augmentation with per-sample, counter-based randomness.

Every class can stand in a configuration file by its ``class_path``; the lower-case names are the same
classes under the names that read well in Python.
"""

from lightning_nrml.data.views.base import ViewOp, Views
from lightning_nrml.data.views.color import BandJitter, ColorJitter, GaussianBlur, Grayscale, Solarize
from lightning_nrml.data.views.contrastive import (
    BYOLViews,
    MoCoViews,
    MultiCropViews,
    SimCLRViews,
    byol_views,
    moco_views,
    multicrop_views,
    simclr_views,
)
from lightning_nrml.data.views.geometry import (
    HorizontalFlip,
    RandomAffine,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    VerticalFlip,
)
from lightning_nrml.data.views.library import KorniaOp
from lightning_nrml.data.views.recipes import (
    EACViews,
    EvalView,
    InsCLRViews,
    MetricView,
    eval_view,
    metric_view,
)
from lightning_nrml.data.views.rng import Draws, ViewKey, counter_uniform

__all__ = [
    "BYOLViews",
    "BandJitter",
    "ColorJitter",
    "Draws",
    "EACViews",
    "EvalView",
    "GaussianBlur",
    "Grayscale",
    "HorizontalFlip",
    "InsCLRViews",
    "KorniaOp",
    "MetricView",
    "MoCoViews",
    "MultiCropViews",
    "RandomAffine",
    "RandomErasing",
    "RandomResizedCrop",
    "Resize",
    "SimCLRViews",
    "Solarize",
    "VerticalFlip",
    "ViewKey",
    "ViewOp",
    "Views",
    "byol_views",
    "counter_uniform",
    "eval_view",
    "metric_view",
    "moco_views",
    "multicrop_views",
    "simclr_views",
]
