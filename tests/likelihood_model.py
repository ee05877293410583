"""A small network trained for a few seconds on smooth images, and such images."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext import Diffusion, UNet, UNetConfig

STEPS = 200


def images(count: int, seed: int) -> Tensor:
    """float32 [count, 1, 8, 8], 8-bit levels in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    corners = 2 * torch.rand(count, 1, 2, 2, generator=generator) - 1
    smooth = F.interpolate(corners, (8, 8), mode="bilinear", align_corners=True)
    noisy = 1.3 * smooth + 0.05 * torch.randn(count, 1, 8, 8, generator=generator)
    return ((noisy.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def untrained(seed: int = 0, num_classes: int | None = None) -> UNet:
    """The network with random numbers in the layers that are initialised to zero."""
    torch.manual_seed(seed)
    model = UNet(
        UNetConfig(
            image_size=8, in_channels=1, out_channels=2, model_channels=32, num_res_blocks=1,
            channel_mult=(1,), attention_resolutions=(), num_classes=num_classes,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.03)
    model.diffusion = Diffusion("cosine", STEPS)
    return model.eval()


@functools.cache
def trained() -> UNet:
    """The network after 80 steps of the hybrid objective; shared, so do not change it."""
    model = untrained()
    assert model.diffusion is not None
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in range(80):
        x_0 = images(32, step)
        t = torch.randint(STEPS, (len(x_0),), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        optimizer.zero_grad()
        model.diffusion.training_losses(model, x_0, t, noise)["loss"].mean().backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
