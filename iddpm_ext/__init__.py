"""Improved denoising diffusion on PyTorch, with fused C++, CUDA and Triton kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it; a module itself where the two are equal. Loaded at
# first use: importing iddpm_ext is quick and asks for no optional library.
_LAZY: dict[str, str] = {
    "Diffusion": "iddpm_ext.diffusion",
    "UNet": "iddpm_ext.unet",
    "UNetConfig": "iddpm_ext.unet_config",
    "classifier_gradient": "iddpm_ext.sampling",
    "interpolate": "iddpm_ext.sampling",
    "invert": "iddpm_ext.sampling",
    "load": "iddpm_ext.checkpoint",
    "save": "iddpm_ext.checkpoint",
    "metrics": "iddpm_ext.metrics",
    "ops": "iddpm_ext.ops",
    "sample": "iddpm_ext.sampling",
    "sample_progressive": "iddpm_ext.sampling",
    "save_animation": "iddpm_ext.images",
    "save_images": "iddpm_ext.images",
}

if TYPE_CHECKING:
    from iddpm_ext.checkpoint import load as load
    from iddpm_ext.checkpoint import save as save
    from iddpm_ext.diffusion import Diffusion as Diffusion
    from iddpm_ext.images import save_animation as save_animation
    from iddpm_ext.images import save_images as save_images
    from iddpm_ext.sampling import classifier_gradient as classifier_gradient
    from iddpm_ext.sampling import interpolate as interpolate
    from iddpm_ext.sampling import invert as invert
    from iddpm_ext.sampling import sample as sample
    from iddpm_ext.sampling import sample_progressive as sample_progressive
    from iddpm_ext.unet import UNet as UNet
    from iddpm_ext.unet_config import UNetConfig as UNetConfig

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'iddpm_ext' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
