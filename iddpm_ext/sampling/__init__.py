"""Sampling: the reverse chain, and the engines that run a network fast."""

from __future__ import annotations

from .classifier_guidance import classifier_gradient
from .cpu_tune import tune
from .inversion import interpolate, invert
from .loop import SampleStep, sample, sample_progressive

__all__ = [
    "SampleStep",
    "classifier_gradient",
    "interpolate",
    "invert",
    "sample",
    "sample_progressive",
    "tune",
]
