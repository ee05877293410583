"""The network's first, last and upsampling convolutions.

Each uses a kernel of ours on a GPU where that supports the shape, else PyTorch's functions. `backend` is
"auto", "reference" or "cuda", as in `ops.pixel_rows`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.ops.arguments import DTYPE_CODES, check_launch, plane, stream
from iddpm_ext.ops.pixel_rows import choose

_LAST = torch.channels_last
_MOST_IMAGE_CHANNELS = 8
_LAST_CHANNELS = (1, 2, 3, 6)  # out-channels that the kernel is compiled for
_SLICE = 32


def first_convolution(
    x: Tensor, weight: Tensor, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """A 3x3 convolution of images, computed in float32 and rounded once.

    x: float32 [N, C, H, W]. weight: float32 [K, C, 3, 3], in memory [C, 3, 3, K] (`columns_last`).
    Returns [N, K, H, W] of `dtype`, channels_last.
    """
    n, c, height, width = x.shape
    k = len(weight)
    supported = c <= _MOST_IMAGE_CHANNELS and k % 4 == 0 and columns_last(weight) is weight
    if choose(backend, x) == "reference" or not supported or not len(x):
        h = F.conv2d(x.contiguous(memory_format=_LAST), weight, None, padding=1)
        # Of one-channel images no format can be told, so the convolution may return the other one.
        return h.to(dtype, memory_format=_LAST)
    y = torch.empty((n, k, height, width), dtype=dtype, device=x.device, memory_format=_LAST)
    images = plane(x)
    with torch.cuda.device(x.device):
        code = _native.native().first_conv_cuda(
            (n, height, width, c, k), DTYPE_CODES[dtype], images.view, weight.data_ptr(),
            y.data_ptr(), stream(x),
        )  # fmt: skip
    check_launch("first_convolution", code)
    return y


def last_convolution(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """A 3x3 convolution to images, computed in float32.

    x: [N, C, H, W], channels_last. weight: float32 [K, C, 3, 3], in memory [C, 3, 3, K]. bias: float32 [K].
    Returns float32 [N, K, H, W].
    """
    n, c, height, width = x.shape
    k = len(weight)
    supported = c % _SLICE == 0 and k in _LAST_CHANNELS and columns_last(weight) is weight
    if choose(backend, x) == "reference" or not supported or not len(x):
        return F.conv2d(x.float(), weight, bias, padding=1)
    x = x.contiguous(memory_format=_LAST)
    y = torch.empty((n, k, height, width), dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        code = _native.native().last_conv_cuda(
            (n, height, width, c, k), DTYPE_CODES[x.dtype], x.data_ptr(), weight.data_ptr(),
            bias.data_ptr(), y.data_ptr(), stream(x),
        )  # fmt: skip
    check_launch("last_convolution", code)
    return y


def columns_last(weight: Tensor) -> Tensor:
    """weight [K, C, 3, 3] with memory laid out as [C, 3, 3, K]; not copied if it already is."""
    if weight.permute(1, 2, 3, 0).is_contiguous():
        return weight
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def doubling_weight(weight: Tensor) -> Tensor:
    """The four 2x2 filters whose outputs interleave to a 3x3 convolution of a doubled image.

    weight: [K, C, 3, 3], float32, so that sums are rounded once. Returns [4K, C, 2, 2], for output pixels
    at (even row, even column), (even, odd), (odd, even), (odd, odd).
    """
    k, c = weight.shape[:2]
    # Output row 2i reads row i - 1 of x by its first tap and row i by the other two; output row 2i + 1
    # reads row i by its first two taps and row i + 1 by the last.
    taps = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=weight.dtype, device=weight.device
    )
    four = torch.einsum("aiu,bjv,kcuv->abkcij", taps, taps, weight)
    return four.reshape(4 * k, c, 2, 2)


def doubled_convolution(x: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """A 3x3 convolution with padding 1 of images doubled by nearest neighbour, with 4/9 of the products.

    x: [N, C, H, W], channels_last. weight: [4K, C, 2, 2] of `doubling_weight`.
    Returns [N, K, 2H, 2W], channels_last.
    """
    n, _, height, width = x.shape
    k = len(weight) // 4
    z = F.conv2d(x, weight, None, padding=1).contiguous(memory_format=_LAST)
    y = torch.empty(
        (n, k, 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=_LAST
    )
    if choose(backend, x) == "reference" or not len(x):
        for number in range(4):
            i, j = divmod(number, 2)
            part = z[:, number * k : (number + 1) * k, i : i + height, j : j + width]
            y[:, :, i::2, j::2] = part
        return y
    with torch.cuda.device(x.device):
        code = _native.native().interleave_cuda(
            (n, height, width, k), DTYPE_CODES[x.dtype], z.data_ptr(), y.data_ptr(), stream(x)
        )
    check_launch("doubled_convolution", code)
    return y
