"""Training: one configuration, one loop, atomic checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import TrainConfig

if TYPE_CHECKING:
    from iddpm_ext.checkpoint.runs import newest_checkpoint

    from .averages import reconstruct_average
    from .log import read_records
    from .loop import train

__all__ = ["TrainConfig", "newest_checkpoint", "read_records", "reconstruct_average", "train"]

# Imported lazily, since they import much (most of them torch) that `iddpm train --help` does not need.
_LAZY = {
    "newest_checkpoint": "iddpm_ext.checkpoint.runs",
    "read_records": "iddpm_ext.training.log",
    "reconstruct_average": "iddpm_ext.training.averages",
    "train": "iddpm_ext.training.loop",
}

if not TYPE_CHECKING:  # a type checker would take every name for an existing one

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_LAZY[name]), name)
