// One term of the variational bound in nats, with its derivatives: the KL divergence of two
// Gaussians, or at the last step the negative log-likelihood that a Gaussian gives to 8-bit values.
// Sixteen elements at a time. iddpm_ext/gaussian.py is the same in PyTorch.
#pragma once

#include "common/simd.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr double kInverseLn2 = 1.4426950408889634;

struct Term {
  vf value;
  vf d_mean;          // by the model's mean
  vf d_log_variance;  // by the model's log-variance
};

// e^x - 1 - x, given e^x: near 0 by its series, where the difference would keep no digits.
IDDPM_INLINE vf exp_remainder(vf x, vf e) {
  vf series = splat(1.0f / 40320.0f);
  series = series * x + 1.0f / 5040.0f;
  series = series * x + 1.0f / 720.0f;
  series = series * x + 1.0f / 120.0f;
  series = series * x + 1.0f / 24.0f;
  series = series * x + 1.0f / 6.0f;
  series = series * x + 0.5f;
  const vi near = (x > splat(-0.5f)) & (x < splat(0.5f));
  return select(near, series * x * x, e - 1.0f - x);
}

// KL(N(mean + difference, e^true_lv) || N(mean, e^lv)), where inverse_true = e^-true_lv.
IDDPM_INLINE Term kl_term(vf difference, vf true_lv, vf inverse_true, vf lv) {
  const vf ratio = exp(true_lv - lv);
  const vf pull = difference * ratio * inverse_true;
  const vf square = difference * pull;
  return {0.5f * (exp_remainder(true_lv - lv, ratio) + square), -pull,
          0.5f * (1.0f - ratio - square)};
}

struct Cdf {
  vf value;
  vf density;
};

// 0.5 (1 + tanh(k (x + 0.044715 x^3))), k = sqrt(2 / pi), written as a logistic function: it keeps
// its digits where it is small.
IDDPM_INLINE Cdf approximate_cdf(vf x) {
  x = clamp(x, -1e6f, 1e6f);
  const vf square = x * x;
  const float k = 0.7978845608028654f;
  const vf value = 1.0f / (1.0f + exp(-2.0f * k * x * (1.0f + 0.044715f * square)));
  return {value, 2.0f * k * value * (1.0f - value) * (1.0f + 0.134145f * square)};
}

constexpr float kHalfBin = 1.0f / 255.0f;
constexpr float kLeastProbability = 1e-12f;

// -log of the probability of x's bin, x +- 1/255, open to infinity at the lowest and the highest
// level. Bins right of the mean are mirrored to its left, where the difference of the two values
// keeps its digits.
IDDPM_INLINE Term decoder_term(vf x, vf mean, vf lv) {
  const vf inverse = exp(-0.5f * lv);
  const vf centred = x - mean;
  const vi lowest = x<splat(-0.999f), highest = x> splat(0.999f);
  const vi mirrored = select_mask(lowest | highest, highest, centred > splat(0.0f));
  const vf side = select(mirrored, splat(-1.0f), splat(1.0f));
  const vf upper = inverse * (side * centred + kHalfBin);
  const vf lower = inverse * (side * centred - kHalfBin);
  const Cdf right = approximate_cdf(upper);
  const vi edge = lowest | highest;
  Cdf left = approximate_cdf(lower);
  left.value = select(edge, splat(0.0f), left.value);
  left.density = select(edge, splat(0.0f), left.density);

  const vf probability = right.value - left.value;
  const vi floored = probability < splat(kLeastProbability);
  const vf bounded = select(floored, splat(kLeastProbability), probability);
  const vf d_centred = side * inverse * (right.density - left.density) / bounded;
  const vf d_lv = -0.5f * (right.density * upper - left.density * lower) / bounded;
  const vf zero = splat(0.0f);
  // log makes a number of NaN's bits.
  const vf nats = select(bounded == bounded, -log(bounded), bounded);
  return {nats, select(floored, zero, d_centred), select(floored, zero, -d_lv)};
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
