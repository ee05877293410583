"""Converts a `UNet` to a `UNet2DModel` of diffusers and back, without changing the weights."""

from __future__ import annotations

from typing import Any

import torch

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.engines.structure import weights_alone
from iddpm_ext.interop import mapping
from iddpm_ext.interop.diffusers_api import UNet2DModel
from iddpm_ext.interop.tensors import tensors_from_diffusers, tensors_to_diffusers
from iddpm_ext.interop.unet2d import IDDPMUNet2DModel
from iddpm_ext.networks.unet import UNet


def to_diffusers(model: UNet, *, stock: bool | None = None) -> Any:
    """The network as a `UNet2DModel`, with copies of the weights, in evaluation mode.

    Args:
        model: a UNet that matches its configuration (no hooks, for example), also inside PyTorch's
            wrappers (`torch.compile`, DataParallel and the like). Its diffusion process is converted
            separately, to an `IDDPMScheduler`.
        stock: True for the stock class; False for `IDDPMUNet2DModel`, which supports more (heads of
            several widths, the label -1, super-resolution); None for the stock class if it computes the
            same on every input.

    Returns:
        the same function up to rounding: `unet(x, t, class_labels=y).sample` is `model(x, t, y)`.

    Raises:
        ValueError: the requested class has no such network, or the model is more than its weights.
    """
    model = weights_alone("to_diffusers", model)
    use_stock = mapping.is_stock(model.config) if stock is None else stock
    arguments = mapping.unet2d_arguments(model.config, stock=use_stock)
    with torch.device("meta"):
        unet = (UNet2DModel if use_stock else IDDPMUNet2DModel)(**arguments)
    unet.load_state_dict(tensors_to_diffusers(model.state_dict(), model.config), assign=True)
    return unet.eval().requires_grad_(True)


def from_diffusers(unet: Any, *, diffusion: Diffusion | None = None) -> UNet:
    """A `UNet` that computes what a `UNet2DModel` does, with copies of its weights.

    Args:
        unet: a `UNet2DModel` or `IDDPMUNet2DModel` like the paper's: timestep sinusoids without a shift,
            32 groups, eps 1e-5, SiLU.
        diffusion: the process it was trained for, `scheduler.diffusion` of an `IDDPMScheduler`.

    Returns:
        a UNet in evaluation mode, its `diffusion` set.

    Raises:
        ValueError: no UNet computes the same; the message lists all differences.
    """
    if not isinstance(unet, UNet2DModel):
        raise TypeError(f"from_diffusers: unet must be a UNet2DModel, got {type(unet).__name__}")
    config = mapping.config_of_unet2d(unet.config)
    with torch.device("meta"):
        model = UNet(config)
    model.load_state_dict(tensors_from_diffusers(unet.state_dict(), config), assign=True)
    model.diffusion = diffusion
    return model.eval().requires_grad_(True)
