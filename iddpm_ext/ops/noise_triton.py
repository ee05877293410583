"""Normal numbers in Triton kernels, as `iddpm_ext.random` defines them: four per Philox counter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _uniform(word):
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _sincos_turn(u):
    """sin and cos of 2 pi u for u in [0, 1]; tl.sin would include a float64 path for huge arguments."""
    quarter = tl.floor(4.0 * u + 0.5)
    x = (u - 0.25 * quarter) * 6.283185307179586
    y = x * x
    sine = x + x * y * (-1.6666654611e-1 + y * (8.3321608736e-3 - 1.9515295891e-4 * y))
    cosine = 4.166664568298827e-2 + y * (-1.388731625493765e-3 + 2.443315711809948e-5 * y)
    cosine = 1.0 - 0.5 * y + y * y * cosine
    turns = quarter.to(tl.int32)
    odd = (turns & 1) == 1
    s, c = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where((turns & 2) != 0, -s, s), tl.where(((turns + 1) & 2) != 0, -c, c)


@triton.jit
def _pair(word_radius, word_angle):
    radius = tl.sqrt(-2.0 * tl.log(_uniform(word_radius)))
    sine, cosine = _sincos_turn(_uniform(word_angle))
    return radius * cosine, radius * sine


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
