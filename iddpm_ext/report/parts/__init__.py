"""The parts of the page, one function each, which measures a model and returns what the page shows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iddpm_ext.report.elements import Body
from iddpm_ext.report.parts.advice import cost
from iddpm_ext.report.parts.bits import likelihood
from iddpm_ext.report.parts.drawing import chain, nearest, samples
from iddpm_ext.report.parts.history import configuration, training
from iddpm_ext.report.subject import Subject


@dataclass(frozen=True)
class Part:
    """A section of the page. lead: its purpose, in a sentence."""

    id: str
    title: str
    lead: str
    make: Callable[[Subject], Body]


PARTS = (
    Part("samples", "Samples", "What the model draws, class by class.", samples),
    Part("chain", "From noise to image", "The reverse chain, step by step.", chain),
    Part("nearest", "Nearest training images", "Whether the model copies what it saw.", nearest),
    Part("likelihood", "Bits per dimension", "How well the model predicts new images.", likelihood),
    Part("cost", "Which sampler, how many steps", "Quality against time on this machine.", cost),
    Part("training", "Training", "Whether the loss still falls, and where.", training),
    Part("configuration", "Configuration", "What the checkpoint holds.", configuration),
)  # fmt: skip
