"""Sampling: the reverse chain, and the engines that run a network fast."""

from __future__ import annotations

from .loop import SampleStep, sample, sample_progressive

__all__ = ["SampleStep", "sample", "sample_progressive"]
