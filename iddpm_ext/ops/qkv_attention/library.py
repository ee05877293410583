"""Attention by PyTorch's own scaled-dot-product attention, on views of qkv."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.ops.qkv_attention.layout import (
    empty_like_rows,
    is_by_token,
    laid_out_like,
    split_heads,
)
from iddpm_ext.ops.rows import no_autocast


def qkv_attention(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """[N, C, T] from qkv [N, 3C, T]. No mask: cuDNN's backward pass has been wrong with one at T = 64.

    The fused kernels want a head's channels side by side, so that qkv by channels is copied, once;
    qkv by tokens (channels_last) is not.
    """
    n, channels, tokens = qkv.shape
    if qkv.numel() == 0:
        return empty_like_rows(qkv, channels // 3).zero_()
    by_token = qkv if is_by_token(qkv) else qkv.transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = (x.transpose(2, 3) for x in split_heads(by_token, num_heads, order))
    with no_autocast(qkv.device.type):
        out = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, d]
    return laid_out_like(qkv, out.permute(0, 1, 3, 2).reshape(n, channels // 3, tokens))
