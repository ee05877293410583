"""GroupNorm and its surroundings in PyTorch, line by line, and the gradients by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.ops.group_norm_silu.layout import empty_like_images, optional
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
    """y, the sum, and mean and 1 / deviation of every group; halves are computed in float32."""
    dtype = compute_dtype(x)
    h = x.to(dtype)
    if residual is not None:
        h = h + residual.to(dtype)
    if channel_bias is not None:
        h = h + _per_channel(channel_bias.to(dtype))
    total = optional(x)
    if write_sum:
        total = empty_like_images(x).copy_(h)
        h = total.to(dtype)
    if x2 is not None:
        h = torch.cat([h, x2.to(dtype)], dim=1)

    grouped = _grouped(h, num_groups)
    mean = grouped.mean(dim=2)
    variance = (grouped - mean[:, :, None]).square().mean(dim=2)
    rstd = (variance + eps).rsqrt()
    normalised = ((grouped - mean[:, :, None]) * rstd[:, :, None]).view(h.shape)
    z = _modulated(normalised, weight, bias, scale, shift)
    y = z * z.sigmoid() if silu else z
    return empty_like_images(x, h.shape[1]).copy_(y), total, mean, rstd


def group_norm_silu_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    x2: Tensor | None,
    channel_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    channel_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, x2, weight, bias, scale, shift and channel_bias [N, C1]; x is what was normalised."""
    dtype = compute_dtype(x)
    h = x.to(dtype)
    if channel_bias is not None:
        h = h + _per_channel(channel_bias.to(dtype))
    if x2 is not None:
        h = torch.cat([h, x2.to(dtype)], dim=1)
    num_groups, channels = mean.shape[1], x.shape[1]
    grouped = _grouped(h, num_groups)
    centred = grouped - mean.to(dtype)[:, :, None]
    normalised = (centred * rstd.to(dtype)[:, :, None]).view(h.shape)

    dz = dy.to(dtype)
    if silu:
        z = _modulated(normalised, weight, bias, scale, shift)
        s = z.sigmoid()
        dz = dz * (s + z * s * (1 - s))
    factor = 1 + scale.to(dtype) if scale is not None else torch.ones_like(dz[:, :, 0, 0])
    s1, s2 = dz.sum(dim=(2, 3)), (dz * normalised).sum(dim=(2, 3))
    w, b = weight.to(dtype), bias.to(dtype)

    g = _grouped(dz * _per_channel(w * factor), num_groups)
    unit = _grouped(normalised, num_groups)
    along_mean = g.mean(dim=2, keepdim=True)
    along_x = (g * unit).mean(dim=2, keepdim=True)
    dh = (rstd.to(dtype)[:, :, None] * (g - along_mean - unit * along_x)).view(h.shape)

    dx, dx2 = dh[:, :channels], dh[:, channels:]
    dchannel_bias = dx.sum(dim=(2, 3))
    if dsum is not None:
        dx = dx + dsum.to(dtype)
    return (
        empty_like_images(x).copy_(dx),
        empty_like_images(x, x2.shape[1]).copy_(dx2) if x2 is not None else optional(x),
        (factor * s2).sum(dim=0),
        (factor * s1).sum(dim=0),
        w * s2 + b * s1 if scale is not None else optional(s1),
        s1 if shift is not None else optional(s1),
        dchannel_bias if channel_bias_grad else optional(s1),
    )


def _per_channel(value: Tensor) -> Tensor:
    """[C] or [N, C], shaped to meet [N, C, H, W]."""
    return value[..., None, None]


def _grouped(h: Tensor, num_groups: int) -> Tensor:
    """[N, C, H, W] -> [N, groups, elements of a group]."""
    n, c, height, width = h.shape
    return h.reshape(n, num_groups, c // num_groups * height * width)


def _modulated(
    normalised: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    dtype = normalised.dtype
    z = normalised * _per_channel(weight.to(dtype)) + _per_channel(bias.to(dtype))
    if scale is not None:
        z = z * (1 + _per_channel(scale.to(dtype)))
    if shift is not None:
        z = z + _per_channel(shift.to(dtype))
    return z
