"""The coefficients of a chain that jumps from step t to an earlier step s: one row of the table per pair.

All backends take them from here. They are computed in float64, because they are differences of nearly equal
numbers if s is close to t; kernels read the rounded rows, as they read the table's for single steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.ops.columns import NUM_COLUMNS, Column


def jump_rows(table: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    """Rows of the chains {.., s, t, ..} at t, float64 [N, S, 16]; NaN for impossible jumps.

        alpha = alpha_bar_t / alpha_bar_s,  beta = 1 - alpha
        beta_tilde = beta (1 - alpha_bar_s) / (1 - alpha_bar_t)                    (equation 10)
        mean = (sqrt(alpha_bar_s) beta x_0 + sqrt(alpha) (1 - alpha_bar_s) x_t) / (1 - alpha_bar_t)  (11)

    Targets -1 and -1 - r jump to x_0 itself, alpha_bar_s = 1; log beta_tilde is then that of the jump from
    r, or from t + 1 (past the table's end: from pure noise), to t. Kind of log-variance and of prediction are
    found from the table, by tensor operations: the host reads no values.
    """
    length = table.shape[0]
    t, targets = t[:, None], targets[None, :]
    decoder = targets < 0
    after = torch.where(targets == -1, t + 1, -1 - targets)
    other = torch.where(decoder, after, targets)
    beyond = (targets == -1) & (after == length)
    exists = torch.where(decoder, (other > t) & (other < length) | beyond, other < t)
    exists = exists & (t >= 0) & (t < length)

    pair = table[:, [Column.LOG_ALPHA_BAR_HIGH, Column.LOG_ALPHA_BAR_LOW]].double()
    now, then = pair[t.clamp(0, length - 1)], pair[other.clamp(0, length - 1)]
    log_now = now.sum(-1).expand_as(other)
    # High parts first: where s is close to t they are close, and their difference is exact.
    between = (then - now).sum(-1)

    log_previous = torch.where(decoder, torch.zeros_like(log_now), then.sum(-1))
    log_alpha = torch.where(decoder, log_now, -between)
    one_minus_now = -torch.expm1(log_now)
    one_minus_previous = -torch.expm1(log_previous)
    beta = -torch.expm1(log_alpha)
    log_beta = torch.where(beta > 0.5, torch.log1p(-log_alpha.exp()), beta.log())

    excess = beta * log_previous.exp() / one_minus_previous
    excess_after = torch.where(beyond, 0.0, between.exp() * one_minus_now / -torch.expm1(between))
    log_range = torch.where(decoder, excess_after, excess).log1p()
    posterior = log_beta - log_range
    mean_x0 = (0.5 * log_previous).exp() * beta / one_minus_now
    mean_xt = (0.5 * log_alpha).exp() * one_minus_previous / one_minus_now

    rows = table.double()[t.clamp(0, length - 1)].expand(*other.shape, NUM_COLUMNS).clone()
    rows[..., Column.MEAN_X0] = mean_x0
    rows[..., Column.MEAN_XT] = mean_xt
    rows[..., Column.POSTERIOR_LOG_VARIANCE] = posterior
    bias, scale = _log_variance(table, decoder, log_beta, posterior)
    rows[..., Column.LOG_VARIANCE_BIAS] = bias
    rows[..., Column.LOG_VARIANCE_SCALE] = scale
    # A network that predicts x_prev is taken to predict the x at the end of the jump.
    x_prev = (table[:, Column.TARGET_XT] != 0).any()
    rows[..., Column.X0_FROM_XT] = torch.where(
        x_prev, -mean_xt / mean_x0, rows[..., Column.X0_FROM_XT]
    )
    rows[..., Column.X0_FROM_OUT] = torch.where(x_prev, 1 / mean_x0, rows[..., Column.X0_FROM_OUT])
    return torch.where(exists[..., None], rows, float("nan"))


def _log_variance(
    table: Tensor, decoder: Tensor, log_beta: Tensor, posterior: Tensor
) -> tuple[Tensor, Tensor]:
    """(u, w) with log_variance = u + w v, of the same kind as the table's."""
    bias, scale = table[:, Column.LOG_VARIANCE_BIAS], table[:, Column.LOG_VARIANCE_SCALE]
    itself = ((scale == 1) & (bias == 0)).all()
    ranged = scale.any() & ~itself
    small = (bias == table[:, Column.POSTERIOR_LOG_VARIANCE]).all()
    fixed = torch.where(small | decoder, posterior, log_beta)
    half_range = (log_beta - posterior) / 2
    u = torch.where(ranged, log_beta - half_range, torch.where(itself, 0.0, fixed))
    w = torch.where(ranged, half_range, itself.to(half_range.dtype))
    return u, w
