"""The columns of the coefficient table, float32 [T, 16]: one 64-byte row per step.

`Diffusion.table` fills it and every op of the diffusion process reads it, so that schedules, predictions,
variances and samplers differ in coefficients only, not in code.
"""

from __future__ import annotations

import enum


class Column(enum.IntEnum):
    """The first two: x_0 = X0_FROM_XT x_t + X0_FROM_OUT out. The others are explained one by one."""

    X0_FROM_XT = 0
    X0_FROM_OUT = 1
    #: mean = MEAN_X0 x_0 + MEAN_XT x_t, equation (11) of DDPM, or DDIM's deterministic part
    MEAN_X0 = 2
    MEAN_XT = 3
    #: log_variance = LOG_VARIANCE_BIAS + LOG_VARIANCE_SCALE v, v the raw second half of the output
    LOG_VARIANCE_BIAS = 4
    LOG_VARIANCE_SCALE = 5
    #: 0 at the last step and where sigma = 0, else 1
    NOISE_SCALE = 6
    #: log beta_tilde, with t = 0 replaced by t = 1
    POSTERIOR_LOG_VARIANCE = 7
    SQRT_ALPHA_BAR = 8
    SQRT_ONE_MINUS_ALPHA_BAR = 9
    #: the network's regression target: TARGET_X0 x_0 + TARGET_XT x_t + TARGET_NOISE noise
    TARGET_X0 = 10
    TARGET_XT = 11
    TARGET_NOISE = 12
    #: log alpha_bar as an unevaluated sum of two floats
    LOG_ALPHA_BAR_HIGH = 13
    LOG_ALPHA_BAR_LOW = 14
    #: index in the training chain
    STEP = 15


NUM_COLUMNS = len(Column)
