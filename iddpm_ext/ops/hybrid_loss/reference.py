"""The two parts of the hybrid loss in PyTorch, line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.ops.columns import Column
from iddpm_ext.ops.rows import Rows, compute_dtype, drawn_noise
from iddpm_ext.ops.vlb_terms.reference import vlb_terms


def hybrid_loss(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    steps: Tensor | None,
    seed: int,
    stream_draw: int,
    t: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """(mse, vlb), each [N] in float32, or float64 where an input is."""
    dtype = compute_dtype(model_output, x_0, x_t)
    row = Rows(table, t, dtype)
    if samples is not None and steps is not None:
        noise = drawn_noise(x_0, samples, steps, seed, stream_draw)
    assert noise is not None
    out, v = model_output.chunk(2, dim=1)

    target = row[Column.TARGET_X0] * x_0.to(dtype) + row[Column.TARGET_XT] * x_t.to(dtype)
    target = target + row[Column.TARGET_NOISE] * noise.to(dtype)
    mse = (out.to(dtype) - target).square().flatten(1).mean(1)
    mean_fixed = torch.cat([out.detach(), v], dim=1)
    return mse, vlb_terms(mean_fixed, x_0, x_t, t, table, clip=False, exact=False)
