"""Sums over the pixels and additions per channel of a channels_last feature map, a matrix pixels x channels.

On a GPU, PyTorch's own reductions and broadcast additions take several times as long as moving the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.ops.arguments import DTYPE_CODES, check_launch, stream
from iddpm_ext.ops.operators import define


def rows_of(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N H W, C]; a view of channels_last images of any pitch, else a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images_of(rows: Tensor, like: Tensor) -> Tensor:
    """[N H W, C] as channels_last images of as many pixels as `like` [N, _, H, W] has."""
    n, _, height, width = like.shape
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)


def channel_sums(rows: Tensor, backend: str = "auto") -> Tensor:
    """Sums over the pixels, added in an order that depends on their number alone.

    rows: [R, C], the channels of a pixel side by side. backend: "auto", "reference" or "cuda".
    Returns float32 [C], or float64 for float64. Not differentiable.
    """
    return _channel_sums(rows, choose(backend, rows))


def settle(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    """x = x + residual + bias in place, rounded once on a GPU; returns x.

    x, residual: channels_last images [N, C, H, W] of one dtype. bias: float32 [C].
    backend: as in `channel_sums`. Differentiable in all of them.
    """
    if torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in (x, residual, bias)
    ):
        return _Settle.apply(x, residual, bias, backend)
    return _settled(x, residual, bias, backend)


class _Settle(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, bias: Tensor | None, backend: str
    ) -> Tensor:
        ctx.backend = backend
        ctx.has = residual is not None, bias is not None
        ctx.mark_dirty(x)
        return _settled(x, residual, bias, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        has_residual, has_bias = ctx.has
        dbias = channel_sums(rows_of(dy), ctx.backend) if has_bias else None
        return dy, dy if has_residual else None, dbias, None


def choose(backend: str, x: Tensor) -> str:
    """The backend for x: "cuda" or "reference"."""
    if backend == "auto":
        supported = x.device.type == "cuda" and x.dtype in DTYPE_CODES
        return "cuda" if supported and _native.cuda_absence() is None else "reference"
    return backend if backend == "cuda" else "reference"


def _settled(x: Tensor, residual: Tensor | None, bias: Tensor | None, backend: str) -> Tensor:
    rows = x.permute(0, 2, 3, 1).view(-1, x.shape[1])  # a view, since it is written to
    others = None if residual is None else rows_of(residual)
    if choose(backend, x) == "reference":
        if others is not None:
            rows.add_(others)
        if bias is not None:
            rows.add_(bias)
        return x
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device(x.device):
        code = _native.native().settle_cuda(
            tuple(rows.shape),
            DTYPE_CODES[x.dtype],
            (rows.data_ptr(), rows.stride(0)),
            (0, 0) if others is None else (others.data_ptr(), others.stride(0)),
            0 if bias is None else bias.data_ptr(),
            stream(x),
        )
    check_launch("settle", code)
    return x


def _reference(rows: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.sum(dim=0, dtype=wide)


def _cuda(rows: Tensor) -> Tensor:
    count, channels = rows.shape
    if channels > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    module = _native.native()
    chunks = module.channel_sums_chunks(count)
    workspace = torch.empty(chunks, channels, dtype=torch.float32, device=rows.device)
    make = torch.empty if count else torch.zeros
    sums = make(channels, dtype=torch.float32, device=rows.device)
    with torch.cuda.device(rows.device):
        code = module.channel_sums_cuda(
            (count, channels),
            DTYPE_CODES[rows.dtype],
            (rows.data_ptr(), rows.stride(0)),
            workspace.data_ptr(),
            sums.data_ptr(),
            stream(rows),
        )
    check_launch("channel_sums", code)
    return sums


def _fake(rows: Tensor, backend: str) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.empty(rows.shape[1], dtype=wide, device=rows.device)


_channel_sums = define(
    "channel_sums(Tensor rows, str backend) -> Tensor",
    {"reference": _reference, "cuda": _cuda},
    _fake,
)
