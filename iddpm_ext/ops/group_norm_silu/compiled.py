"""Calls of the compiled kernels: brings tensors into their layouts and allocates results."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.ops.arguments import DTYPE_CODES, NO_PLANE
from iddpm_ext.ops.group_norm_silu.layout import (
    empty_like_images,
    is_channels_last,
    laid_out,
    optional,
)

#: Pixels per partial sum: kGroupNormSlab of csrc/group_norm_silu/group_norm_silu.h.
SLAB = 256

Outputs = tuple[Tensor, ...]


class _Call:
    """The arguments that forward and backward share; keeps every tensor alive until the launch."""

    def __init__(self, x: Tensor, x2: Tensor | None) -> None:
        self.alive: list[object] = []
        self.channels_last = is_channels_last(x)
        n, c1, h, w = x.shape
        self.n, self.c1, self.hw = n, c1, h * w
        self.c = c1 + (x2.shape[1] if x2 is not None else 0)
        self.like = x
        self.x, self.x2 = self.images(x), self.images(x2)

    def images(self, x: Tensor | None) -> tuple[int, int, int, int]:
        """Address and strides of images in the layout of the call."""
        if x is None:
            return NO_PLANE
        found = laid_out(x, self.channels_last)
        self.alive.append(found)
        return found.view

    def rows(self, value: Tensor | None) -> tuple[int, int]:
        """Address and row stride of float32 [C] (stride 0) or [N, C]."""
        if value is None:
            return 0, 0
        value = value.float()
        if value.stride(-1) != 1:
            value = value.contiguous()
        self.alive.append(value)
        return value.data_ptr(), value.stride(0) if value.ndim == 2 else 0

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def workspace(self) -> int:
        """Size in floats, as group_norm_workspace of csrc/group_norm_silu/group_norm_silu.h has it."""
        slabs = (self.hw + SLAB - 1) // SLAB
        space = self.floats(3 * self.n * self.c * (slabs + 2))
        self.alive.append(space)
        return space.data_ptr()

    def input(
        self,
        channel_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        silu: bool,
    ) -> tuple[object, ...]:
        """The fields of `GroupNormInput`, in the order of csrc/bindings.cpp."""
        parameters = (
            *self.rows(channel_bias),
            self.rows(weight)[0],
            self.rows(bias)[0],
            *self.rows(scale),
            *self.rows(shift),
            mean.data_ptr(),
            rstd.data_ptr(),
        )
        sizes = (self.n, self.c, self.c1, self.hw, mean.shape[1])
        code = DTYPE_CODES[self.like.dtype]
        return sizes, code, self.channels_last, silu, self.x, self.x2, parameters


def prepare(
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
) -> tuple[Outputs, tuple[object, ...], _Call]:
    """`kernels.Prepared` of the forward pass."""
    call = _Call(x, x2)
    y = empty_like_images(x, call.c)
    total = empty_like_images(x) if write_sum else optional(x)
    mean, rstd = call.floats(call.n, num_groups), call.floats(call.n, num_groups)
    arguments = (
        call.input(channel_bias, weight, bias, scale, shift, mean, rstd, silu),
        eps,
        call.images(residual),
        call.images(total) if write_sum else NO_PLANE,
        call.images(y),
        call.workspace(),
    )
    return (y, total, mean, rstd), arguments, call


def prepare_bwd(
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
) -> tuple[Outputs, tuple[object, ...], _Call]:
    """`kernels.Prepared` of the backward pass."""
    call = _Call(x, x2)
    n, c = call.n, call.c
    dx = empty_like_images(x)
    dx2 = empty_like_images(x, x2.shape[1]) if x2 is not None else optional(x)
    dweight, dbias = call.floats(c), call.floats(c)
    dscale = call.floats(n, c) if scale is not None else call.floats(0)
    dshift = call.floats(n, c) if shift is not None else call.floats(0)
    dchannel_bias = call.floats(n, call.c1) if channel_bias_grad else call.floats(0)
    gradients = (dweight, dbias, dscale, dshift, dchannel_bias)
    arguments = (
        call.input(channel_bias, weight, bias, scale, shift, mean, rstd, silu),
        call.images(dy),
        call.images(dsum),
        call.images(dx),
        call.images(dx2) if x2 is not None else NO_PLANE,
        tuple(g.data_ptr() for g in gradients),
        call.workspace(),
    )
    return (dx, dx2, *gradients), arguments, call
