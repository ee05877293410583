"""Calls of the compiled kernels: allocates results and passes addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.ops.arguments import DTYPE_CODES
from iddpm_ext.ops.qkv_attention.layout import empty_like_rows

View = tuple[int, int, int, int]


def _readable(x: Tensor) -> Tensor:
    """x [N, C, T] with adjacent channels or adjacent tokens; copied only if it has neither."""
    return x if x.stride(1) == 1 or x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _view(x: Tensor) -> View:
    """Address, and the strides of sample, channel and token in elements."""
    sample, channel, token = x.stride()
    return x.data_ptr(), sample, channel, token if x.shape[2] > 1 else 1


def _input(
    qkv: Tensor, statistics: Tensor, num_heads: int, order: str
) -> tuple[tuple[int, ...], int, View, int]:
    """The fields of `QkvAttentionInput`, in the order of csrc/bindings.cpp."""
    n, channels, tokens = qkv.shape
    width = channels // (3 * num_heads)
    steps = (3 * width, width) if order == "legacy" else (width, num_heads * width)
    sizes = (n, tokens, num_heads, width, *steps)
    return sizes, DTYPE_CODES[qkv.dtype], _view(qkv), statistics.data_ptr()


def empty_statistics(qkv: Tensor, num_heads: int) -> Tensor:
    """Uninitialised float32 [N, heads, 2, T]: maximum and normaliser of each softmax."""
    n, _, tokens = qkv.shape
    return torch.empty((n, num_heads, 2, tokens), dtype=torch.float32, device=qkv.device)


def cpu(qkv: Tensor, num_heads: int, order: str) -> tuple[Tensor, Tensor]:
    """The forward kernel: the result [N, C, T], and the statistics of its softmax."""
    qkv = _readable(qkv)
    out = empty_like_rows(qkv, qkv.shape[1] // 3)
    statistics = empty_statistics(qkv, num_heads)
    if out.numel():
        kernels, threads = _native.native(), torch.get_num_threads()
        arguments = _input(qkv, statistics, num_heads, order)
        floats = kernels.attention_workspace(arguments[0][1], arguments[0][3])
        workspace = torch.empty(threads * floats, dtype=torch.float32, device=qkv.device)
        kernels.qkv_attention_cpu(arguments, _view(out), workspace.data_ptr(), threads)
    return out, statistics


def cpu_bwd(dout: Tensor, qkv: Tensor, statistics: Tensor, num_heads: int, order: str) -> Tensor:
    """The gradient of qkv, in its layout."""
    dout, qkv = _readable(dout), _readable(qkv)
    dqkv = empty_like_rows(qkv, qkv.shape[1])
    if dqkv.numel():
        kernels, threads = _native.native(), torch.get_num_threads()
        arguments = _input(qkv, statistics, num_heads, order)
        floats = kernels.attention_bwd_workspace(arguments[0][1], arguments[0][3])
        workspace = torch.empty(threads * floats, dtype=torch.float32, device=qkv.device)
        kernels.qkv_attention_bwd_cpu(
            arguments, _view(dout), _view(dqkv), workspace.data_ptr(), threads
        )
    return dqkv
