"""The convolution in PyTorch's own functions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.ops.group_norm_silu.layout import memory_format
from iddpm_ext.ops.rows import no_autocast


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, upscale: bool = False, exact: bool = True
) -> Tensor:
    """x [N, C, H, W], weight [K, C, 3, 3] or [K, C, 1, 1], bias [K] -> y [N, K, H, W], laid out like x.

    With `upscale` y is [N, K, 2H, 2W].
    """
    source = F.interpolate(x, scale_factor=2.0, mode="nearest") if upscale else x
    bias = None if bias is None else bias.to(x.dtype)
    with no_autocast(x.device.type):
        y = F.conv2d(source, weight.to(x.dtype), bias, padding=weight.shape[2] // 2)
    return y.contiguous(memory_format=memory_format(x))
