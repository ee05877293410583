"""Training: one configuration, one loop, checkpoints that survive anything."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import TrainConfig

if TYPE_CHECKING:
    from iddpm_ext.checkpoint.runs import newest_checkpoint

    from .averages import reconstruct_average
    from .loop import train

__all__ = ["TrainConfig", "newest_checkpoint", "reconstruct_average", "train"]

# The configuration alone is what `iddpm train --help` reads: torch is imported with the others.
_LAZY = {
    "newest_checkpoint": "iddpm_ext.checkpoint.runs",
    "reconstruct_average": "iddpm_ext.training.averages",
    "train": "iddpm_ext.training.loop",
}

if not TYPE_CHECKING:  # to a checker it would say that every name exists

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_LAZY[name]), name)
