// One term of the variational bound in nats, with its derivatives: the KL divergence of two
// Gaussians, or at the last step the negative log-likelihood that a Gaussian gives to 8-bit values.
// Sixteen elements at a time. iddpm_ext/ops/gaussian.py is the same in PyTorch.
#pragma once

#include "common/simd_math.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr double kInverseLn2 = 1.4426950408889634;

struct Term {
  vf value;
  vf d_mean;          // derivative in the model's mean
  vf d_log_variance;  // derivative in the model's log-variance
};

// (e^x - 1 - x) / x^2 for |x| < 0.5.
IDDPM_INLINE vf exp_series(vf x) {
  vf series = splat(1.0f / 40320.0f);
  series = series * x + 1.0f / 5040.0f;
  series = series * x + 1.0f / 720.0f;
  series = series * x + 1.0f / 120.0f;
  series = series * x + 1.0f / 24.0f;
  series = series * x + 1.0f / 6.0f;
  return series * x + 0.5f;
}

// e^x - 1 - x, given e^x: near 0 by its series, where the difference would cancel.
IDDPM_INLINE vf exp_remainder(vf x, vf e) {
  const vi near = (x > splat(-0.5f)) & (x < splat(0.5f));
  return select(near, exp_series(x) * x * x, e - 1.0f - x);
}

// 1 - e^-x for x >= 0.
IDDPM_INLINE vf one_minus_exp(vf x) {
  return select(x < splat(0.5f), x - exp_series(-x) * x * x, 1.0f - exp(-x));
}

// KL(N(mean + difference, e^true_lv) || N(mean, e^lv)), where inverse_true = e^-true_lv.
IDDPM_INLINE Term kl_term(vf difference, vf true_lv, vf inverse_true, vf lv) {
  const vf ratio = exp(true_lv - lv);
  const vf pull = difference * ratio * inverse_true;
  const vf square = difference * pull;
  return {0.5f * (exp_remainder(true_lv - lv, ratio) + square), -pull,
          0.5f * (1.0f - ratio - square)};
}

constexpr float kHalfBin = 1.0f / 255.0f;
constexpr float kLeastProbability = 1e-12f;

// The distribution function 0.5 (1 + tanh(k (x + 0.044715 x^3))), k = sqrt(2 / pi), is the logistic
// function of slope(x) = 2k (x + 0.044715 x^3).
constexpr float kSlope = 2.0f * 0.7978845608028654f;
constexpr float kCubic = 0.044715f;

// -log of the probability of x's bin, x +- 1/255, which extends to infinity at the lowest and the
// highest level. Bins right of the mean are mirrored to its left, and there
//   L(a) - L(b) = L(a) L(-b) (1 - e^(b - a)),   with a - b as a product with the bin's width,
// does not cancel even for a narrow bin, whose two values are nearly equal. The derivatives use
// L' = L (1 - L), which turns differences of L' into differences of L.
IDDPM_INLINE Term decoder_term(vf x, vf mean, vf lv) {
  const vf inverse = exp(-0.5f * lv);
  const vf centred = x - mean;
  const vi lowest = x<splat(-0.999f), highest = x> splat(0.999f);
  const vi edge = lowest | highest;
  const vi mirrored = (edge & highest) | (~edge & (centred > splat(0.0f)));
  const vf side = select(mirrored, splat(-1.0f), splat(1.0f));
  // Bounded to avoid 0 * infinity; the probability is 0 or 1 long before.
  const vf upper = clamp(inverse * (side * centred + kHalfBin), -1e6f, 1e6f);
  const vf lower = clamp(inverse * (side * centred - kHalfBin), -1e6f, 1e6f);
  const vf width = 2.0f * kHalfBin * clamp(inverse, 0.0f, 1e18f);

  const vf zero = splat(0.0f), one = splat(1.0f);
  const vf upper_square = upper * upper;
  const vf squares = upper_square + upper * lower + lower * lower;
  const vf gap = kSlope * width * (1.0f + kCubic * squares);  // a - b
  const vf right = 1.0f / (1.0f + exp(-kSlope * upper * (1.0f + kCubic * upper_square)));
  const vf odds = select(edge, zero, exp(kSlope * lower * (1.0f + kCubic * lower * lower)));
  const vf above = 1.0f / (1.0f + odds);  // L(-b)
  const vf share = select(edge, one, one_minus_exp(gap));

  const vf probability = right * above * share;
  const vi floored = probability < splat(kLeastProbability);
  const vf bounded = select(floored, splat(kLeastProbability), probability);
  const vf left = odds * above;
  const vf balance = (1.0f - right - left) * kSlope * (1.0f + 3.0f * kCubic * upper_square);
  const vf ratio = kSlope * width * left / (right * share);
  const vf d_mean = side * inverse * (balance + ratio * (3.0f * kCubic) * (upper + lower));
  const vf d_lv = 0.5f * (balance * upper + ratio * (1.0f + 3.0f * kCubic * squares));
  // log does not propagate NaN.
  const vf nats = select(bounded == bounded, -log(bounded), bounded);
  return {nats, select(floored, zero, d_mean), select(floored, zero, d_lv)};
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
