"""Metrics of sets of images, computed in float64 from arrays of features [N, D]."""

from __future__ import annotations

from .frechet import frechet_distance
from .inception_score import InceptionScore, inception_score
from .kernel import KernelDistance, kernel_distance
from .neighbours import Neighbourhoods, PrecisionRecall, precision_recall
from .resampling import Interval, half_sample_interval
from .statistics import FeatureStatistics, Moments, feature_statistics

__all__ = [
    "FeatureStatistics",
    "InceptionScore",
    "Interval",
    "KernelDistance",
    "Moments",
    "Neighbourhoods",
    "PrecisionRecall",
    "feature_statistics",
    "frechet_distance",
    "half_sample_interval",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
