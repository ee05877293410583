"""Attention by PyTorch's own scaled-dot-product attention, on views of qkv."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.ops.qkv_attention.layout import (
    empty_like_rows,
    is_by_token,
    laid_out_like,
)
from iddpm_ext.ops.rows import no_autocast

#: Alignment in bytes of rows that PyTorch's memory-efficient kernel needs; PyTorch selects it without a look
#: at strides, and it then refuses other rows.
_ALIGNMENT = 16


def qkv_attention(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """[N, C, T] from qkv [N, 3C, T]. No mask: cuDNN's backward pass has been wrong with one at T = 64.

    The fused kernels need adjacent channels in aligned rows. So contiguous qkv is copied once; channels_last
    qkv is not, unless its rows are unaligned. PyTorch pads heads whose width is no multiple of 16 bytes, or
    computes them by plain matrix products.
    """
    n, channels, tokens = qkv.shape
    if qkv.numel() == 0:
        return empty_like_rows(qkv, channels // 3).zero_()
    q, k, v = _split_rows(_by_token(qkv), num_heads, order)
    with no_autocast(qkv.device.type):
        out = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, d]
    return laid_out_like(qkv, out.permute(0, 1, 3, 2).reshape(n, channels // 3, tokens))


def _split_rows(rows: Tensor, num_heads: int, order: str) -> tuple[Tensor, ...]:
    """q, k and v, each [N, heads, T, d], as views of rows [N, T, 3C].

    Splitting the last dimension makes the gradient one concatenation in the order of memory.
    """
    n, tokens, channels = rows.shape
    width = channels // (3 * num_heads)
    if order == "legacy":
        parts = rows.view(n, tokens, num_heads, 3 * width).split(width, dim=3)
    else:
        parts = rows.split(channels // 3, dim=2)
    return tuple(part.view(n, tokens, num_heads, width).transpose(1, 2) for part in parts)


def _by_token(qkv: Tensor) -> Tensor:
    """The rows [N, T, 3C] of qkv [N, 3C, T], every one at an aligned address."""
    rows = qkv.transpose(1, 2)
    steps = (rows.stride(0), rows.stride(1), rows.storage_offset())
    if not is_by_token(qkv) or any(step * qkv.element_size() % _ALIGNMENT for step in steps):
        # `contiguous` would not change the stride of a single token.
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows
