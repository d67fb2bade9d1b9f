"""Optimiser and learning-rate schedule from two small config dataclasses."""

from lightning_nrml.optim.factory import OptimizerConfig, ScheduleConfig, create_optimizer, create_schedule
from lightning_nrml.optim.lars import LARS

__all__ = ["LARS", "OptimizerConfig", "ScheduleConfig", "create_optimizer", "create_schedule"]
