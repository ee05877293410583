"""The imports from the optional library diffusers, or an error that says how to install it."""

from __future__ import annotations

try:
    from diffusers import DDPMPipeline, ImagePipelineOutput, UNet2DModel
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d import UNet2DOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        "iddpm_ext: this needs the library diffusers: pip install diffusers"
    ) from error

__all__ = [
    "Attention",
    "AttnProcessor",
    "AttnProcessor2_0",
    "ConfigMixin",
    "DDPMPipeline",
    "DDPMSchedulerOutput",
    "ImagePipelineOutput",
    "ResnetBlock2D",
    "SchedulerMixin",
    "UNet2DModel",
    "UNet2DOutput",
    "randn_tensor",
    "register_to_config",
]
