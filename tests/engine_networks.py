"""The networks that the tests of engines run: small ones of every kind of configuration."""

from __future__ import annotations

import copy

import torch

from iddpm_ext.networks.unet import UNet, UNetConfig

SMALL = {"image_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
CONFIGS = {
    "bundled": {
        "image_size": 28,
        "in_channels": 1,
        "out_channels": 2,
        "model_channels": 32,
        "num_res_blocks": 2,
        "channel_mult": (1, 2, 3),
        "attention_resolutions": (14, 7),
        "num_classes": 10,
    },
    "four levels": {"image_size": 32, "model_channels": 32, "num_res_blocks": 1},
    "widths of 64x64": {
        "image_size": 16,
        "model_channels": 32,
        "num_res_blocks": 3,
        "channel_mult": (1, 2, 3, 4),
        "attention_resolutions": (4, 2),
    },
    "one head, shift only": {
        "image_size": 32,
        "model_channels": 32,
        "num_res_blocks": 1,
        "num_heads": 1,
        "channel_mult": (1, 1, 2, 2, 4),
        "attention_resolutions": (4,),
        "use_scale_shift_norm": False,
    },
    "fixed variance, heads differ": {**SMALL, "out_channels": 3, "num_heads_upsample": 2},
    "super-resolution": {**SMALL, "super_resolution": True, "num_classes": 4},
    "single level": {**SMALL, "channel_mult": (2,), "in_channels": 4, "out_channels": 8},
}
# Configurations that the CPU engine does not support.
MORE_CONFIGS = {
    "averaged": {**SMALL, "conv_resample": False, "attention_resolutions": (8,)},
    "resampling blocks, new heads": {
        **SMALL,
        "attention_resolutions": (8,),
        "resblock_updown": True,
        "attention_order": "new",
    },
    "concatenated identity": {**SMALL, "channel_mult": (2, 1)},
}


def make(**config) -> UNet:
    """A network whose weights keep activations near one, without the zeroed last layers."""
    model = UNet(UNetConfig(**config)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.1 * noise)
    return model


def inputs(model, n, seed=1):
    c = model.config
    torch.manual_seed(seed)
    channels = c.in_channels * (2 if c.super_resolution else 1)
    x = torch.randn(n, channels, c.image_size, c.image_size)
    y = None if c.num_classes is None else torch.arange(n) % (c.num_classes + 1) - 1
    return x, y


def reference(model, x, timesteps, y):
    """float64; the engine's x holds an up-sampled image already, so `low_res` is its second half."""
    x, low_res = x.double(), None
    if model.config.super_resolution:
        x, low_res = x.chunk(2, dim=1)
    return copy.deepcopy(model).double()(x, timesteps.double(), y, low_res)


def error(ours, truth) -> float:
    """The largest absolute difference over the largest absolute value."""
    return ((ours - truth).abs().max() / truth.abs().max()).item()
