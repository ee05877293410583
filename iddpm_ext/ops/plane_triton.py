"""Addresses of a sample's elements, in Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset(at, hw, channel_stride, pixel_stride, DENSE: tl.constexpr):
    """Offset of element `at` (NCHW order) within its sample."""
    # A dense sample is one range of memory: no division, and vector loads.
    if DENSE:
        return at
    else:
        channel = at // hw
        return channel * channel_stride + (at - channel * hw) * pixel_stride
