"""Optimiser and learning-rate schedule from two small config dataclasses."""

from lightning_nrml.optim.factory import OptimizerConfig, ScheduleConfig, create_optimizer, create_schedule

__all__ = ["OptimizerConfig", "ScheduleConfig", "create_optimizer", "create_schedule"]
