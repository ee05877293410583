"""Bits per dimension with error bars, and step schedules that optimise them."""

from __future__ import annotations

from .covariance import find_covariance
from .moments import find_moments
from .result import Likelihood, PerStep
from .run import nll
from .schedules import StepSchedules, find_schedules

__all__ = [
    "Likelihood",
    "PerStep",
    "StepSchedules",
    "find_covariance",
    "find_moments",
    "find_schedules",
    "nll",
]
