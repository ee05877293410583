"""Evaluates samples against a reference: sources of images, feature extractors, scores."""

from __future__ import annotations

from .compare import METRICS, Evaluation, Score, evaluate
from .extractors import Extraction, Extractor, open_extractor

__all__ = [
    "METRICS",
    "Evaluation",
    "Extraction",
    "Extractor",
    "Score",
    "evaluate",
    "open_extractor",
]
