"""Shared by the references: rows of the coefficient table, precision, noise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from iddpm_ext.ops.arguments import empty_images
from iddpm_ext.ops.columns import Column
from iddpm_ext.ops.modes import transformed
from iddpm_ext.random import NoiseKey, normal


class Rows:
    """The rows of `table` at steps t [N]; a column is [N, 1, 1, 1], to broadcast with images [N, C, H, W]."""

    def __init__(self, table: Tensor, t: Tensor, dtype: torch.dtype) -> None:
        self._rows = table[t].to(dtype)

    def __getitem__(self, column: Column) -> Tensor:
        return self._rows[:, column, None, None, None]


def like_images(x: Tensor, value: Tensor) -> Tensor:
    """value [N, C, H, W] with the dtype and the memory format of x."""
    # A transformed tensor has no memory of its own to be laid out.
    return value.to(x.dtype) if transformed() else empty_images(x, value.shape[1]).copy_(value)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor has it, else float32: nothing is computed in half precision."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def with_room_for_gradients(x: Tensor) -> Tensor:
    """x, converted to float32 if it is float16 and requires a gradient.

    A fused loss computes its gradient before the loss scale is known, and the range of float16 is too small
    for an unscaled one. So it is scaled in float32 and rounded once.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad
    return x.float() if wanted and x.dtype == torch.float16 else x


# Computed once, because compilers before PyTorch 2.13 cannot trace the query.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def no_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context without autocast."""
    # No context if autocast is off, so that exported graphs have no region for it.
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def drawn_noise(
    like: Tensor, samples: Tensor, steps: Tensor, seed: int, stream_draw: int
) -> Tensor:
    """The noise that a kernel draws for these arguments of its operator: float32, of the shape of `like`."""
    key = NoiseKey(seed % (1 << 64), stream_draw % 16, samples, steps, stream_draw // 16)
    return normal(key, like.shape, like.device)
