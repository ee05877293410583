"""The network's two fused operators in PyTorch's own functions: for export, and for comparison."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    channel_bias: Tensor | None = None,
) -> Tensor:
    """As `iddpm_ext.ops.group_norm_silu`, for x [N, C, H, W] and channel_bias [N, C]."""
    # Half-precision statistics lose digits, so everything up to the result is at least float32.
    work = torch.promote_types(x.dtype, torch.float32)
    h = x.to(work)
    if channel_bias is not None:
        h = h + channel_bias.to(work)[:, :, None, None]
    h = torch.group_norm(h, num_groups, weight.to(work), bias.to(work), eps)
    if scale is not None and shift is not None:
        h = h * (1 + scale.to(work)[:, :, None, None]) + shift.to(work)[:, :, None, None]
    return (F.silu(h) if silu else h).to(x.dtype)


def qkv_attention(qkv: Tensor, num_heads: int, order: str = "legacy") -> Tensor:
    """Self-attention; qkv [N, 3C, T] -> [N, C, T].

    order: "legacy" splits channels into heads, then each head into q, k and v; "new" into q, k and v, then
        each into heads.
    """
    n, width, length = qkv.shape
    if order == "legacy":
        q, k, v = qkv.reshape(n * num_heads, width // num_heads, length).chunk(3, dim=1)
    else:
        q, k, v = qkv.reshape(n, 3, num_heads, -1, length).transpose(0, 1).flatten(1, 2)
    # Scaling q and k by the fourth root of d each keeps the product within the range of float16.
    root = 1 / math.sqrt(math.sqrt(q.shape[1]))
    logits = torch.einsum("bct,bcs->bts", q * root, k * root)
    work = torch.promote_types(qkv.dtype, torch.float32)
    attention = torch.softmax(logits.to(work), dim=-1).to(v.dtype)
    return torch.einsum("bts,bcs->bct", attention, v).reshape(n, width // 3, length)
