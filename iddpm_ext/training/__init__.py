"""Training: one configuration, one loop, checkpoints that survive anything."""

from __future__ import annotations

from iddpm_ext.checkpoint.runs import newest_checkpoint

from .config import TrainConfig
from .loop import train

__all__ = ["TrainConfig", "newest_checkpoint", "train"]
