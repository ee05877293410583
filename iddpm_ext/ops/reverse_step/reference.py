"""The reverse step in PyTorch, line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.ops.columns import Column
from iddpm_ext.ops.rows import Rows, compute_dtype, drawn_noise, like_images


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    steps: Tensor | None,
    seed: int,
    stream_draw: int,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """x_prev and x_0, both like x_t; half precision is computed in float32 and rounded once."""
    dtype = compute_dtype(x_t, model_output)
    row = Rows(table, t, dtype)
    channels = x_t.shape[1]
    x = x_t.to(dtype)
    out = model_output[:, :channels].to(dtype)

    x_0 = row[Column.X0_FROM_XT] * x + row[Column.X0_FROM_OUT] * out
    if clip:
        x_0 = x_0.clamp(-1, 1)
    x_prev = row[Column.MEAN_X0] * x_0 + row[Column.MEAN_XT] * x

    if samples is not None and steps is not None:
        noise = drawn_noise(x_t, samples, steps, seed, stream_draw)
    if noise is not None:
        log_variance = row[Column.LOG_VARIANCE_BIAS]
        if model_output.shape[1] > channels:
            v = model_output[:, channels:].to(dtype)
            log_variance = log_variance + row[Column.LOG_VARIANCE_SCALE] * v
        scale = row[Column.NOISE_SCALE]
        # `where`, since 0 times an infinite deviation would be NaN in a step that adds no noise.
        noisy = x_prev + scale * (0.5 * log_variance).exp() * noise.to(dtype)
        x_prev = torch.where(scale != 0, noisy, x_prev)
    return like_images(x_t, x_prev), like_images(x_t, x_0)
