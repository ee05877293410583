"""Normals in Triton kernels: the definition of `iddpm_ext.random`, four to a Philox counter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _uniform(word):
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _pair(word_radius, word_angle):
    radius = tl.sqrt(-2.0 * tl.log(_uniform(word_radius)))
    angle = 6.283185307179586 * _uniform(word_angle)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, first_quad, sample, step, stream_draw, BLOCK: tl.constexpr):
    """The 4 * BLOCK normals of the counters first_quad .. first_quad + BLOCK - 1, in element order."""
    quad = (first_quad + tl.arange(0, BLOCK)).to(tl.uint32)
    zero = tl.zeros([BLOCK], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        quad,
        (zero + sample).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (zero + stream_draw).to(tl.uint32),
    )
    z0, z1 = _pair(w0, w1)
    z2, z3 = _pair(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
