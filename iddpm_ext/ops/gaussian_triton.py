"""One element's term of the variational bound in Triton; csrc/common/gaussian.h explains the formulas."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp_series(x):
    # (e^x - 1 - x) / x^2 for |x| < 0.5.
    series = 1.0 / 5040.0 + x * (1.0 / 40320.0)
    series = 1.0 / 720.0 + x * series
    series = 1.0 / 120.0 + x * series
    series = 1.0 / 24.0 + x * series
    series = 1.0 / 6.0 + x * series
    return 0.5 + x * series


@triton.jit
def kl_term(difference, true_lv, lv):
    """KL(N(mean + difference, e^true_lv) || N(mean, e^lv)) in nats: value, and derivatives in mean and lv."""
    gap = true_lv - lv
    ratio = tl.exp(gap)
    pull = difference * tl.exp(-lv)
    square = difference * pull
    remainder = tl.where(tl.abs(gap) < 0.5, _exp_series(gap) * gap * gap, ratio - 1.0 - gap)
    return 0.5 * (remainder + square), -pull, 0.5 * (1.0 - ratio - square)


@triton.jit
def _bounded(x):
    x = tl.where(x < -1e6, -1e6, x)
    return tl.where(x > 1e6, 1e6, x)


@triton.jit
def decoder_term(x, mean, lv):
    """-log of the probability of x's bin by the tanh approximation, clamped to at least 1e-12."""
    k = 2.0 * 0.7978845608028654
    cubic = 0.044715
    half_bin = 0.00392156862745098
    inverse = tl.exp(-0.5 * lv)
    centred = x - mean
    edge = (x < -0.999) | (x > 0.999)
    side = tl.where(tl.where(edge, x > 0.0, centred > 0.0), -1.0, 1.0)
    upper = _bounded(inverse * (side * centred + half_bin))
    lower = _bounded(inverse * (side * centred - half_bin))
    width = 2.0 * half_bin * tl.where(inverse > 1e18, 1e18, inverse)
    squares = upper * upper + upper * lower + lower * lower
    right = 1.0 / (1.0 + tl.exp(-k * upper * (1.0 + cubic * upper * upper)))
    odds = tl.where(edge, 0.0, tl.exp(k * lower * (1.0 + cubic * lower * lower)))
    above = 1.0 / (1.0 + odds)
    left = odds * above
    gap = k * width * (1.0 + cubic * squares)
    narrow = gap - _exp_series(-gap) * gap * gap
    share = tl.where(edge, 1.0, tl.where(gap < 0.5, narrow, 1.0 - tl.exp(-gap)))
    probability = right * above * share
    floored = probability < 1e-12
    bounded = tl.where(floored, 1e-12, probability)
    balance = (1.0 - right - left) * k * (1.0 + 3.0 * cubic * upper * upper)
    ratio = k * width * left / (right * share)
    d_mean = side * inverse * (balance + ratio * 3.0 * cubic * (upper + lower))
    d_lv = 0.5 * (balance * upper + ratio * (1.0 + 3.0 * cubic * squares))
    return -tl.log(bounded), tl.where(floored, 0.0, d_mean), tl.where(floored, 0.0, d_lv)


@triton.jit
def _log_normal_cdf(x):
    # By erf where that is accurate, else by a continued fraction for the left tail.
    near = 0.5 * (1.0 + tl.math.erf(tl.where(x < -3.0, 0.0, x) * 0.7071067811865476))
    far = tl.where(x < -3.0, x, -3.0)
    # The continued fraction of Mills' ratio, evaluated from its innermost term.
    fraction = -far + 0.0 * far
    for k in tl.static_range(60):
        fraction = -far + (60 - k) / fraction
    tail = -0.5 * far * far - 0.9189385332046727 - tl.log(fraction)
    return tl.where(x < -3.0, tail, tl.log(near))


@triton.jit
def expm1(x):
    """e^x - 1, by its series where the difference would cancel."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))))
    return tl.where(tl.abs(x) < 0.02, series, tl.exp(x) - 1.0)


@triton.jit
def exact_decoder_term(x, mean, lv):
    """-log of the probability of x's bin by the normal distribution function itself, in float64."""
    x, mean, lv = x.to(tl.float64), mean.to(tl.float64), lv.to(tl.float64)
    inverse = tl.exp(-0.5 * lv)
    centred = x - mean
    edge = (x < -0.999) | (x > 0.999)
    side = tl.where(tl.where(edge, x > 0.0, centred > 0.0), -1.0, 1.0)
    upper = inverse * (side * centred + 0.00392156862745098)
    lower = inverse * (side * centred - 0.00392156862745098)
    log_right = _log_normal_cdf(upper)
    inner = log_right + tl.log(-expm1(_log_normal_cdf(lower) - log_right))
    log_probability = tl.where(edge, log_right, inner)
    right_density = tl.exp(-0.5 * upper * upper - 0.9189385332046727 - log_probability)
    left_density = tl.exp(-0.5 * lower * lower - 0.9189385332046727 - log_probability)
    left_density = tl.where(edge, 0.0, left_density)
    d_mean = side * inverse * (right_density - left_density)
    d_lv = 0.5 * (right_density * upper - left_density * lower)
    return (-log_probability).to(tl.float32), d_mean.to(tl.float32), d_lv.to(tl.float32)
