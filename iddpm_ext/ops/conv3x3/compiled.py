"""Calls of the compiled kernels, or of PyTorch if they do not support the shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.ops.arguments import DTYPE_CODES
from iddpm_ext.ops.conv3x3 import reference
from iddpm_ext.ops.group_norm_silu.layout import laid_out, memory_format

LANES = 16
MAX_CHANNELS = 4096
# Statuses of csrc/conv3x3/conv3x3.h.
_DONE, _NO_INSTRUCTIONS = 0, 1

Pixels = tuple[int, int]


def rounds(dtype: torch.dtype, exact: bool = False) -> bool:
    """Whether images of this type are convolved by AMX, with rounded weights."""
    if dtype != torch.bfloat16 or exact or _native.cpu_absence() is not None:
        return False
    return bool(_native.native().has_tiles())


def _supported(x: Tensor, weight: Tensor, upscale: bool, exact: bool) -> bool:
    columns, channels, taps = weight.shape[:3]
    ragged = channels % LANES or columns % LANES or max(channels, columns) > MAX_CHANNELS
    if ragged or x.numel() == 0 or weight.numel() == 0:
        return False
    return taps == 3 or (rounds(x.dtype, exact) and not upscale)


def _tile(dtype: torch.dtype, height: int, width: int, exact: bool) -> int:
    """m of Winograd's F(m x m, 3 x 3), or 0 for AMX.

    Depends on dtype and size of the images alone, so that no result depends on the batch.
    """
    if rounds(dtype, exact):
        return 0
    return 4 if not exact and min(height, width) > 4 else 2


def _pixels(x: Tensor) -> tuple[Tensor, Pixels]:
    """x in channels_last, copied if need be, with its address and the elements from pixel to pixel."""
    found = laid_out(x, channels_last=True)
    sample, _, pixel = found.view[1:]
    n, c, h, w = x.shape
    if (n > 1 and sample != h * w * pixel) or (h * w == 1 and pixel < c):
        dense = x.contiguous(memory_format=torch.channels_last)
        return dense, (dense.data_ptr(), c)
    return found.tensor, (found.view[0], pixel if h * w > 1 else c)


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Of column, channel, row and tap; the last two are 0 where there is one tap."""
    column, channel, *taps = weight.stride()
    return (column, channel, *(taps if weight.shape[2] > 1 else (0, 0)))


def _filter(weight: Tensor) -> tuple[int, ...]:
    return (weight.data_ptr(), *_strides(weight))


def _reversed_filter(weight: Tensor) -> tuple[int, ...]:
    """The same memory as the weights of the input's gradient: channels exchanged, taps from the last on."""
    column, channel, row, tap = _strides(weight)
    last = weight.data_ptr() + weight.element_size() * 2 * (row + tap)
    return (last, channel, column, -row, -tap)


def _images(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _run(kernel: str, *arguments: object) -> bool:
    """Runs a kernel; False if the instruction set in use has none."""
    status = getattr(_native.native(), kernel)(*arguments, torch.get_num_threads())
    if status not in (_DONE, _NO_INSTRUCTIONS):
        raise MemoryError("conv3x3: no memory for the transformed images")
    return status == _DONE


def cpu(x: Tensor, weight: Tensor, bias: Tensor | None, upscale: bool, exact: bool) -> Tensor:
    """y of `reference.conv3x3`."""
    if _supported(x, weight, upscale, exact):
        n, c, h, w = x.shape
        if upscale:
            h, w = 2 * h, 2 * w
        y = _images(x, (n, len(weight), h, w))
        kept, source = _pixels(x)
        weight, bias = weight.float(), None if bias is None else bias.float().contiguous()
        done = _run(
            "conv3x3_cpu", (n, h, w, c, len(weight)), DTYPE_CODES[x.dtype], source, _filter(weight),
            0 if bias is None else bias.data_ptr(), (y.data_ptr(), len(weight)),
            _tile(x.dtype, h, w, exact), int(upscale),
        )  # fmt: skip
        del kept
        if done:
            return y.contiguous(memory_format=memory_format(x))
    y = reference.conv3x3(x, weight, bias, upscale)
    return y if y.data_ptr() != x.data_ptr() else y.clone()


def cpu_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    upscale: bool,
    exact: bool,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype and layout), weight and bias (in float32); empty where not wanted."""
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    dx, dweight, dbias = x.new_empty(0), none, none.clone()
    if not _supported(x, weight, upscale, exact):
        return _library_bwd(dy, x, weight, upscale, (wants_x, wants_weight, wants_bias))
    n, c, h, w = x.shape
    size = (n, *dy.shape[2:])
    tile = _tile(x.dtype, dy.shape[2], dy.shape[3], exact)
    code = DTYPE_CODES[x.dtype]
    kept_dy, gradient = _pixels(dy)
    done = True
    if wants_x:
        dense = weight.float()
        dx = _images(x, (n, c, h, w))
        done = _run(
            "conv3x3_cpu", (*size, len(weight), c), code, gradient, _reversed_filter(dense), 0,
            (dx.data_ptr(), c), tile, -int(upscale),
        )  # fmt: skip
        dx = dx.contiguous(memory_format=memory_format(x))
    if wants_weight or wants_bias:
        dweight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
        if wants_bias:
            dbias = torch.empty(len(weight), dtype=torch.float32, device=x.device)
        kept_x, source = _pixels(x)
        done = done and _run(
            "conv3x3_weight_bwd_cpu", (*size, c, len(weight)), code, source, gradient,
            _filter(dweight), dbias.data_ptr() if wants_bias else 0, tile, int(upscale),
        )  # fmt: skip
        del kept_x
        dweight = dweight if wants_weight else none
    del kept_dy
    if not done:
        return _library_bwd(dy, x, weight, upscale, (wants_x, wants_weight, wants_bias))
    return dx, dweight, dbias


def _library_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, upscale: bool, wants: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    source = F.interpolate(x, scale_factor=2.0, mode="nearest") if upscale else x
    padding = 2 * [weight.shape[2] // 2]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy, source, weight.to(x.dtype), [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], 1,
        list(wants),
    )  # fmt: skip
    if wants[0]:
        if upscale:
            n, c, h, w = x.shape
            dx = dx.reshape(n, c, h, 2, w, 2).sum(dim=(3, 5), dtype=torch.float32).to(x.dtype)
        dx = dx.contiguous(memory_format=memory_format(x))
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    return (
        dx if wants[0] else x.new_empty(0),
        dweight.float().contiguous() if wants[1] else none,
        dbias.float() if wants[2] else none.clone(),
    )
