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

#: Bytes that a memory-efficient kernel reads at a time: PyTorch gives it tensors whatever their strides, and
#: it refuses those in which a row begins elsewhere.
_ALIGNMENT = 16


def qkv_attention(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """[N, C, T] from qkv [N, 3C, T]. No mask: cuDNN's backward pass has been wrong with one at T = 64.

    The fused kernels want a head's channels side by side in aligned rows, so that qkv by channels is copied,
    once; qkv by tokens (channels_last) is not, unless its pitch or its start is odd. Heads whose width is no
    multiple of 16 bytes are PyTorch's to pad, or to compute by its plain products.
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

    Split by the last dimension: its gradient is one concatenation of rows, as their memory has them.
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
        # Not `contiguous`, which leaves the stride of a single token as it is.
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows
