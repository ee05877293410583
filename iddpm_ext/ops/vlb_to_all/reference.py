"""The terms of every jump from t in PyTorch: for each target, as `vlb_terms` computes a step."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.ops.rows import Rows, compute_dtype
from iddpm_ext.ops.vlb_terms.reference import bound_terms
from iddpm_ext.ops.vlb_to_all.jumps import jump_rows


def vlb_to_all(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    targets: Tensor,
    clip: bool,
    exact: bool,
) -> Tensor:
    """[N, S] in float32, or float64 where an input is."""
    dtype = compute_dtype(model_output, x_0, x_t)
    rows = jump_rows(table, t, targets)
    each = torch.arange(t.shape[0], device=t.device, dtype=torch.int64)
    columns = [
        bound_terms(
            model_output, x_0, x_t,
            Rows(rows[:, j], each, dtype), targets[j : j + 1] < 0, clip, exact,
        )
        for j in range(targets.shape[0])
    ]  # fmt: skip
    if not columns:
        return torch.empty(t.shape[0], 0, dtype=dtype, device=t.device)
    return torch.stack(columns, 1)
