"""Attention in PyTorch, line by line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iddpm_ext.ops.qkv_attention.layout import laid_out_like, split_heads
from iddpm_ext.ops.rows import compute_dtype, no_autocast


def qkv_attention(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """[N, C, T] from qkv [N, 3C, T]; half precision is computed in float32."""
    with no_autocast(qkv.device.type):
        q, k, v = split_heads(qkv.to(compute_dtype(qkv)), num_heads, order)
        scores = torch.einsum("nhct,nhcs->nhts", q, k) / math.sqrt(q.shape[2])
        probabilities = torch.softmax(scores, dim=-1)
        out = torch.einsum("nhts,nhcs->nhct", probabilities, v)
    return laid_out_like(qkv, out.flatten(1, 2).to(qkv.dtype))
