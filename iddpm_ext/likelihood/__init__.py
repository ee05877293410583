"""Bits per dimension with error bars."""

from __future__ import annotations

from .result import Likelihood, PerStep
from .run import nll

__all__ = ["Likelihood", "PerStep", "nll"]
