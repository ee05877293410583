"""The columns of the coefficient table as constants of Triton kernels: `tl.load(row + X0_FROM_XT)`."""

from __future__ import annotations

import triton.language as tl

from iddpm_ext.ops import columns
from iddpm_ext.ops.columns import Column

NUM_COLUMNS = tl.constexpr(columns.NUM_COLUMNS)
X0_FROM_XT = tl.constexpr(int(Column.X0_FROM_XT))
X0_FROM_OUT = tl.constexpr(int(Column.X0_FROM_OUT))
MEAN_X0 = tl.constexpr(int(Column.MEAN_X0))
MEAN_XT = tl.constexpr(int(Column.MEAN_XT))
LOG_VARIANCE_BIAS = tl.constexpr(int(Column.LOG_VARIANCE_BIAS))
LOG_VARIANCE_SCALE = tl.constexpr(int(Column.LOG_VARIANCE_SCALE))
NOISE_SCALE = tl.constexpr(int(Column.NOISE_SCALE))
POSTERIOR_LOG_VARIANCE = tl.constexpr(int(Column.POSTERIOR_LOG_VARIANCE))
SQRT_ALPHA_BAR = tl.constexpr(int(Column.SQRT_ALPHA_BAR))
SQRT_ONE_MINUS_ALPHA_BAR = tl.constexpr(int(Column.SQRT_ONE_MINUS_ALPHA_BAR))
TARGET_X0 = tl.constexpr(int(Column.TARGET_X0))
TARGET_XT = tl.constexpr(int(Column.TARGET_XT))
TARGET_NOISE = tl.constexpr(int(Column.TARGET_NOISE))
