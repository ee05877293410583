"""The networks that the end-to-end benchmark runs, and their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext import Diffusion
from iddpm_ext.networks.unet import UNet, UNetConfig

CONFIGS = {
    "bundled": iddpm_ext.load("fashion-mnist").config,
    "small": UNetConfig(image_size=32, model_channels=32, num_res_blocks=1),
    "cifar": UNetConfig(image_size=32, model_channels=128, num_res_blocks=3),
    "imagenet64": UNetConfig(
        image_size=64, model_channels=128, num_res_blocks=3, channel_mult=(1, 2, 3, 4)
    ),
}


def make_network(name: str) -> UNet:
    """A network of that configuration, with weights that keep activations near one everywhere."""
    model = UNet(CONFIGS[name]).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.1 * noise)
    model.diffusion = Diffusion()
    return model


def make_inputs(model: UNet, batch: int) -> tuple[Tensor, Tensor | None]:
    """x [batch, C, H, W] and labels [batch] or None."""
    c = model.config
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, c.in_channels, c.image_size, c.image_size, generator=generator)
    labels = None if c.num_classes is None else torch.arange(batch) % c.num_classes
    return x, labels
