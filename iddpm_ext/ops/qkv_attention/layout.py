"""Heads as views of qkv, and its two layouts: adjacent channels (channels_last) or adjacent tokens."""

from __future__ import annotations

from torch import Tensor

from iddpm_ext.ops.modes import transformed


def split_heads(qkv: Tensor, num_heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [N, heads, d, T], as views of qkv [N, 3C, T] of any strides."""
    n, channels, tokens = qkv.shape
    width = channels // (3 * num_heads)
    if order == "legacy":
        q, k, v = qkv.view(n, num_heads, 3, width, tokens).unbind(2)
    else:
        q, k, v = qkv.view(n, 3, num_heads, width, tokens).unbind(1)
    return q, k, v


def is_by_token(x: Tensor) -> bool:
    """Whether the channels of a token of x [N, C, T] are adjacent in memory (channels_last)."""
    return not x.is_contiguous() and x.stride(1) == 1


def empty_like_rows(qkv: Tensor, channels: int) -> Tensor:
    """Uninitialised and dense [N, channels, T] in the layout of qkv."""
    n, _, tokens = qkv.shape
    if is_by_token(qkv):
        return qkv.new_empty(n, tokens, channels).transpose(1, 2)
    return qkv.new_empty(n, channels, tokens)


def laid_out_like(qkv: Tensor, x: Tensor) -> Tensor:
    """x [N, C, T], dense in the layout of qkv; copied only if it has another."""
    if transformed():
        return x.contiguous()
    if qkv.shape[2] < 2:  # counts as contiguous with any strides
        return empty_like_rows(qkv, x.shape[1]).copy_(x)
    if is_by_token(qkv):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()
