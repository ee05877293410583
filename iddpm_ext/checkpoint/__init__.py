"""Checkpoints: one safetensors file with everything that sampling from a network needs.

The file's metadata holds, as JSON text: `format_version`, `unet` (a UNetConfig), `diffusion` (absent
where the network has none) and `extra` (facts of training, step schedules); a classifier's has
`classifier` instead of `unet`. OpenAI's .pt files are read too, with a configuration from `released.py` or
from flags, and the folders of runs and of diffusers. No code in any file is run.
`hub` publishes networks and fetches them.
"""

from .hub import from_pretrained, is_on_hub, push_to_hub, save_pretrained
from .read import bundled, is_model_folder, load
from .read_classifier import load_classifier
from .write import metadata_of, save

__all__ = [
    "bundled",
    "from_pretrained",
    "is_model_folder",
    "is_on_hub",
    "load",
    "load_classifier",
    "metadata_of",
    "push_to_hub",
    "save",
    "save_pretrained",
]
