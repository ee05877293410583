"""Sampling: the reverse chain, its solvers and guidance, inversion, two stages."""

from __future__ import annotations

from iddpm_ext.engines.cpu.tune import tune

from .classifier_guidance import classifier_gradient
from .inversion import interpolate, invert
from .loop import SampleStep, sample, sample_progressive
from .pictures import PictureSchedules, find_picture_schedules
from .two_stage import TwoStage, sample_two_stage

__all__ = [
    "PictureSchedules",
    "SampleStep",
    "TwoStage",
    "classifier_gradient",
    "find_picture_schedules",
    "interpolate",
    "invert",
    "sample",
    "sample_progressive",
    "sample_two_stage",
    "tune",
]
