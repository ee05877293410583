"""GroupNorm with sums before it and scale, shift and SiLU after it, in PyTorch, line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.ops.group_norm_silu.layout import like_images, optional
from iddpm_ext.ops.rows import compute_dtype


def group_norm_silu(
    x: Tensor,
    x2: Tensor | None,
    residual: Tensor | None,
    channel_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    write_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum, and mean and 1 / standard deviation of every group; half precision computes in float32."""
    h, total = summed(x, x2, residual, channel_bias, write_sum)
    grouped = _grouped(h, num_groups)
    mean = grouped.mean(dim=2)
    variance = (grouped - mean[:, :, None]).square().mean(dim=2)
    rstd = (variance + eps).rsqrt()
    normalised = ((grouped - mean[:, :, None]) * rstd[:, :, None]).view(h.shape)
    z = modulated(normalised, weight, bias, scale, shift)
    y = z * z.sigmoid() if silu else z
    return like_images(x, y), total, mean, rstd


def summed(
    x: Tensor,
    x2: Tensor | None,
    residual: Tensor | None,
    channel_bias: Tensor | None,
    write_sum: bool,
) -> tuple[Tensor, Tensor]:
    """h of the equation, float32 or float64 [N, C, H, W], and the sum in the dtype of x if it is returned."""
    dtype = compute_dtype(x)
    h = x.to(dtype)
    if residual is not None:
        h = h + residual.to(dtype)
    if channel_bias is not None:
        h = h + _per_channel(channel_bias.to(dtype))
    total = optional(x)
    if write_sum:
        total = like_images(x, h)
        h = total.to(dtype)
    if x2 is not None:
        h = torch.cat([h, x2.to(dtype)], dim=1)
    return h, total


def _per_channel(value: Tensor) -> Tensor:
    """[C] or [N, C], reshaped to broadcast with [N, C, H, W]."""
    return value[..., None, None]


def _grouped(h: Tensor, num_groups: int) -> Tensor:
    """[N, C, H, W] -> [N, groups, elements of a group]."""
    n, c, height, width = h.shape
    return h.reshape(n, num_groups, c // num_groups * height * width)


def modulated(
    normalised: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """z of the equation, from normalised images."""
    dtype = normalised.dtype
    z = normalised * _per_channel(weight.to(dtype)) + _per_channel(bias.to(dtype))
    if scale is not None:
        z = z * (1 + _per_channel(scale.to(dtype)))
    if shift is not None:
        z = z + _per_channel(shift.to(dtype))
    return z
