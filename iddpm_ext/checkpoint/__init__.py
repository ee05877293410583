"""Checkpoints: one safetensors file with everything that sampling from a network needs.

The file's metadata holds, as JSON text: `format_version`, `unet` (a UNetConfig), `diffusion` (absent
where the network has none) and `extra` (facts of training, step schedules). Nothing is unpickled.
"""

from .read import bundled, load
from .write import metadata_of, save

__all__ = ["bundled", "load", "metadata_of", "save"]
