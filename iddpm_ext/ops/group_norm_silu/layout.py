"""The two memory layouts of this op: contiguous (NCHW), and channels_last with or without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.ops.arguments import Plane, plane
from iddpm_ext.ops.modes import transformed


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory; there may be gaps between pixels."""
    if x.is_contiguous():
        return False
    _, c, _, w = x.shape
    return c > 1 and x.stride(1) == 1 and (w == 1 or x.stride(3) >= c)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results for x."""
    if transformed():  # a transformed tensor has no memory of its own
        return torch.contiguous_format
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def empty_like_images(x: Tensor, channels: int | None = None) -> Tensor:
    """Uninitialised dense images like x, or with another number of channels."""
    n, c, h, w = x.shape
    shape = (n, c if channels is None else channels, h, w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def like_images(x: Tensor, value: Tensor) -> Tensor:
    """value [N, C, H, W] with the dtype of x, dense in its memory format."""
    if transformed():
        return value.to(x.dtype)
    return empty_like_images(x, value.shape[1]).copy_(value)


def optional(x: Tensor) -> Tensor:
    """An empty tensor, in the place of a result that is not wanted."""
    return x.new_empty(0)


def laid_out(x: Tensor, channels_last: bool) -> Plane:
    """x in one of the two layouts; copied if it has the other."""
    found = plane(x)
    _, _, channel, pixel = found.view
    _, c, h, w = x.shape
    if channel == 1 or c == 1 if channels_last else pixel == 1 or h * w == 1:
        return found
    return plane(
        x.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
    )
