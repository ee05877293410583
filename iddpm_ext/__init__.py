"""Improved denoising diffusion on PyTorch, with fused C++, CUDA and Triton kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it, or the module itself if the names are equal. Loaded at first use,
# so that importing iddpm_ext is fast and needs no optional library.
_LAZY: dict[str, str] = {
    "Classifier": "iddpm_ext.networks.classifier",
    "ClassifierConfig": "iddpm_ext.networks.classifier",
    "Diffusion": "iddpm_ext.diffusion",
    "EDMDenoiser": "iddpm_ext.networks.edm",
    "IDDPMPipeline": "iddpm_ext.interop.pipeline",
    "IDDPMScheduler": "iddpm_ext.interop.scheduler",
    "IDDPMUNet2DModel": "iddpm_ext.interop.unet2d",
    "Splice": "iddpm_ext.networks.splice",
    "UNet": "iddpm_ext.networks.unet",
    "UNetConfig": "iddpm_ext.networks.config",
    "checkpoint": "iddpm_ext.checkpoint",
    "classifier_gradient": "iddpm_ext.sampling",
    "data": "iddpm_ext.data",
    "evaluate": "iddpm_ext.evaluation",
    "export_onnx": "iddpm_ext.interop.export",
    "export_program": "iddpm_ext.interop.export",
    "accelerate": "iddpm_ext.interop.acceleration",
    "from_diffusers": "iddpm_ext.interop.convert",
    "images": "iddpm_ext.images",
    "interop": "iddpm_ext.interop",
    "interpolate": "iddpm_ext.sampling",
    "invert": "iddpm_ext.sampling",
    "load": "iddpm_ext.checkpoint",
    "load_classifier": "iddpm_ext.checkpoint",
    "metrics": "iddpm_ext.metrics",
    "nll": "iddpm_ext.likelihood",
    "ops": "iddpm_ext.ops",
    "sample": "iddpm_ext.sampling",
    "sample_progressive": "iddpm_ext.sampling",
    "sample_two_stage": "iddpm_ext.sampling",
    "sampling": "iddpm_ext.sampling",
    "save": "iddpm_ext.checkpoint",
    "save_animation": "iddpm_ext.images",
    "save_images": "iddpm_ext.images",
    "to_diffusers": "iddpm_ext.interop.convert",
    "training": "iddpm_ext.training",
}

# When diffusers loads a pipeline, it looks for these base classes in the library of the pipeline's classes,
# which is this package.
_DIFFUSERS_BASES = ("ModelMixin", "SchedulerMixin")

if TYPE_CHECKING:
    from iddpm_ext import checkpoint as checkpoint
    from iddpm_ext import data as data
    from iddpm_ext import images as images
    from iddpm_ext import interop as interop
    from iddpm_ext import metrics as metrics
    from iddpm_ext import ops as ops
    from iddpm_ext import sampling as sampling
    from iddpm_ext import training as training
    from iddpm_ext.checkpoint import load as load
    from iddpm_ext.checkpoint import load_classifier as load_classifier
    from iddpm_ext.checkpoint import save as save
    from iddpm_ext.diffusion import Diffusion as Diffusion
    from iddpm_ext.evaluation import evaluate as evaluate
    from iddpm_ext.images import save_animation as save_animation
    from iddpm_ext.images import save_images as save_images
    from iddpm_ext.interop.acceleration import accelerate as accelerate
    from iddpm_ext.interop.convert import from_diffusers as from_diffusers
    from iddpm_ext.interop.convert import to_diffusers as to_diffusers
    from iddpm_ext.interop.export import export_onnx as export_onnx
    from iddpm_ext.interop.export import export_program as export_program
    from iddpm_ext.interop.pipeline import IDDPMPipeline as IDDPMPipeline
    from iddpm_ext.interop.scheduler import IDDPMScheduler as IDDPMScheduler
    from iddpm_ext.interop.unet2d import IDDPMUNet2DModel as IDDPMUNet2DModel
    from iddpm_ext.likelihood import nll as nll
    from iddpm_ext.networks.classifier import Classifier as Classifier
    from iddpm_ext.networks.classifier import ClassifierConfig as ClassifierConfig
    from iddpm_ext.networks.config import UNetConfig as UNetConfig
    from iddpm_ext.networks.edm import EDMDenoiser as EDMDenoiser
    from iddpm_ext.networks.splice import Splice as Splice
    from iddpm_ext.networks.unet import UNet as UNet
    from iddpm_ext.sampling import classifier_gradient as classifier_gradient
    from iddpm_ext.sampling import interpolate as interpolate
    from iddpm_ext.sampling import invert as invert
    from iddpm_ext.sampling import sample as sample
    from iddpm_ext.sampling import sample_progressive as sample_progressive
    from iddpm_ext.sampling import sample_two_stage as sample_two_stage

__all__ = ["__version__", *_LAZY]


if not TYPE_CHECKING:  # a type checker would take every name for an existing one

    def __getattr__(name: str) -> Any:
        if name in _DIFFUSERS_BASES:
            return getattr(importlib.import_module("diffusers"), name)
        if name not in _LAZY:
            raise AttributeError(f"module 'iddpm_ext' has no attribute {name!r}")
        module = importlib.import_module(_LAZY[name])
        value = module if _LAZY[name] == f"{__name__}.{name}" else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
