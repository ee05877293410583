"""How tensors are passed to the compiled kernels: addresses and strides as integers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext import _native

#: The codes of `csrc/common/dtype.h`.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


#: The view of an absent tensor.
NO_PLANE = (0, 0, 0, 0)


class Plane(NamedTuple):
    """An image batch as a kernel sees it; keeps the tensor alive while the kernel runs."""

    view: tuple[
        int, int, int, int
    ]  # address, and the strides of sample, channel and pixel in elements
    dtype_code: int
    tensor: Tensor


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of sample, channel and pixel; None if the pixels of a channel have no constant stride."""
    _, _, height, width = x.shape
    sample, channel, row, column = x.stride()
    if row == width * column or height == 1:
        return sample, channel, column if width > 1 or height == 1 else row
    return (sample, channel, row) if width == 1 else None


def plane(x: Tensor) -> Plane:
    """x [N, C, H, W] of any strides, for a kernel; copied only if its pixels have no constant stride."""
    strides = None if x.is_contiguous() else _strides(x)
    if strides is None:
        x = x.contiguous()
        _, c, h, w = x.shape
        strides = (c * h * w, h * w, 1)
    return Plane((x.data_ptr(), *strides), DTYPE_CODES[x.dtype], x)


def empty_images(x: Tensor, channels: int | None = None) -> Tensor:
    """Uninitialised [N, C, H, W]: channels_last where x is, else contiguous, as kernels write it."""
    contiguous = x.is_contiguous()
    if channels is None and contiguous:
        return torch.empty_like(x)
    n, c, h, w = x.shape
    last = not contiguous and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (n, c if channels is None else channels, h, w),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def noise_key(
    samples: Tensor | None, steps: Tensor | None, seed: int, stream_draw: int
) -> tuple[int, int, int, int]:
    """A `NoiseKey` as kernels take it; without tensors nothing is drawn. Both must be contiguous."""
    if samples is None or steps is None:
        return (0, 0, 0, 0)
    return (seed % (1 << 64), stream_draw, samples.data_ptr(), steps.data_ptr())


def stream(x: Tensor) -> int:
    """PyTorch's current CUDA stream: read at every launch, because it may change."""
    return torch.cuda.current_stream(x.device).cuda_stream


def check_launch(op: str, code: int) -> None:
    """Raises RuntimeError for the CUDA error code that a launcher returned."""
    if code != 0:
        raise RuntimeError(f"{op}: the CUDA launch failed with {_native.native().cuda_error(code)}")
