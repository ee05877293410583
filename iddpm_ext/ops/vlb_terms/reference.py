"""One term of the variational bound in PyTorch, line by line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iddpm_ext.ops.columns import Column
from iddpm_ext.ops.gaussian import discretized_gaussian_log_likelihood, normal_kl
from iddpm_ext.ops.rows import Rows, compute_dtype


def vlb_terms(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    clip: bool,
    exact: bool,
) -> Tensor:
    """[N] in float32, or float64 where an input is."""
    row = Rows(table, t, compute_dtype(model_output, x_0, x_t))
    return bound_terms(model_output, x_0, x_t, row, t == 0, clip, exact)


def bound_terms(
    model_output: Tensor, x_0: Tensor, x_t: Tensor, row: Rows, last: Tensor, clip: bool, exact: bool
) -> Tensor:
    """[N]: the decoder's NLL where `last` (bool, [N] or [1]) is set, the KL divergence elsewhere."""
    dtype = compute_dtype(model_output, x_0, x_t)
    channels = x_t.shape[1]
    x_0, x_t = x_0.to(dtype), x_t.to(dtype)
    out = model_output[:, :channels].to(dtype)

    predicted = row[Column.X0_FROM_XT] * x_t + row[Column.X0_FROM_OUT] * out
    if clip:
        predicted = predicted.clamp(-1, 1)
    log_variance = row[Column.LOG_VARIANCE_BIAS]
    if model_output.shape[1] > channels:
        v = model_output[:, channels:].to(dtype)
        log_variance = log_variance + row[Column.LOG_VARIANCE_SCALE] * v
    # The means differ in their terms of x_0 alone; the difference of the whole means would cancel.
    difference = row[Column.MEAN_X0] * (x_0 - predicted)
    kl = normal_kl(
        difference, row[Column.POSTERIOR_LOG_VARIANCE], torch.zeros_like(difference), log_variance
    )
    mean = row[Column.MEAN_X0] * predicted + row[Column.MEAN_XT] * x_t
    log_scale = (0.5 * log_variance).expand_as(mean)
    nll = -discretized_gaussian_log_likelihood(x_0, mean, log_scale, exact=exact)
    nats = torch.where(last[:, None, None, None], nll, kl)
    return nats.flatten(1).mean(1) / math.log(2)
