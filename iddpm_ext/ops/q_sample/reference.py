"""The forward process in PyTorch, line by line."""

from __future__ import annotations

from torch import Tensor

from iddpm_ext.ops.columns import Column
from iddpm_ext.ops.rows import Rows, compute_dtype, drawn_noise, like_images


def q_sample(
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    steps: Tensor | None,
    seed: int,
    stream_draw: int,
) -> Tensor:
    """x_t like x_0; half precision is computed in float32 and rounded once."""
    dtype = compute_dtype(x_0)
    row = Rows(table, t, dtype)
    if samples is not None and steps is not None:
        noise = drawn_noise(x_0, samples, steps, seed, stream_draw)
    assert noise is not None
    x_t = row[Column.SQRT_ALPHA_BAR] * x_0.to(dtype)
    x_t = x_t + row[Column.SQRT_ONE_MINUS_ALPHA_BAR] * noise.to(dtype)
    return like_images(x_0, x_t)
