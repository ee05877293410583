// One element's term of the variational bound on the device; gaussian.h has the same for the CPU.
#pragma once

#include "common/cuda_compat.cuh"
#include "common/gaussian_exact.h"

namespace iddpm {

constexpr float kDeviceInverseLn2 = 1.4426950408889634f;

struct DeviceTerm {
  float value;
  float d_mean;          // derivative in the model's mean
  float d_log_variance;  // derivative in the model's log-variance
};

// KL(N(mean + difference, e^true_lv) || N(mean, e^lv)) in nats.
IDDPM_DEVICE DeviceTerm device_kl_term(float difference, float true_lv, float lv) {
  const float gap = true_lv - lv;
  const float pull = difference * expf(-lv);
  const float square = difference * pull;
  // By its series near 0, where e^x - 1 - x would cancel.
  float remainder = expf(gap) - 1.0f - gap;
  if (fabsf(gap) < 0.5f) {
    float series = 1.0f / 40320.0f;
    series = series * gap + 1.0f / 5040.0f;
    series = series * gap + 1.0f / 720.0f;
    series = series * gap + 1.0f / 120.0f;
    series = series * gap + 1.0f / 24.0f;
    series = series * gap + 1.0f / 6.0f;
    series = series * gap + 0.5f;
    remainder = series * gap * gap;
  }
  return {0.5f * (remainder + square), -pull, 0.5f * (1.0f - expf(gap) - square)};
}

// -log of the probability of x's bin, by the tanh approximation, clamped to at least 1e-12;
// gaussian.h explains the formula.
struct ApproximateLikelihood {
  static constexpr int kBlocks = 3;  // of 256 threads on a multiprocessor, so that nothing spills

  static IDDPM_DEVICE float bounded_place(float x) {
    return x < -1e6f ? -1e6f : x > 1e6f ? 1e6f : x;
  }

  static IDDPM_DEVICE DeviceTerm term(float x, float mean, float lv) {
    const float half_bin = 1.0f / 255.0f, least = 1e-12f;
    const float k = 2.0f * 0.7978845608028654f, cubic = 0.044715f;
    const float inverse = expf(-0.5f * lv), centred = x - mean;
    const bool edge = x < -0.999f || x > 0.999f;
    const float side = (edge ? x > 0.0f : centred > 0.0f) ? -1.0f : 1.0f;
    const float upper = bounded_place(inverse * (side * centred + half_bin));
    const float lower = bounded_place(inverse * (side * centred - half_bin));
    const float width = 2.0f * half_bin * (inverse > 1e18f ? 1e18f : inverse);
    const float squares = upper * upper + upper * lower + lower * lower;
    const float right = 1.0f / (1.0f + expf(-k * upper * (1.0f + cubic * upper * upper)));
    const float odds = edge ? 0.0f : expf(k * lower * (1.0f + cubic * lower * lower));
    const float above = 1.0f / (1.0f + odds), left = odds * above;
    const float share = edge ? 1.0f : -expm1f(-k * width * (1.0f + cubic * squares));
    const float probability = right * above * share;
    if (probability < least) return {-logf(least), 0.0f, 0.0f};
    const float balance = (1.0f - right - left) * k * (1.0f + 3.0f * cubic * upper * upper);
    const float ratio = k * width * left / (right * share);
    return {-logf(probability), side * inverse * (balance + ratio * 3.0f * cubic * (upper + lower)),
            0.5f * (balance * upper + ratio * (1.0f + 3.0f * cubic * squares))};
  }
};

// By the normal distribution function itself, in double precision; a separate kernel, so that it
// does not cost the usual one registers.
struct ExactLikelihood {
  static constexpr int kBlocks = 2;

  static IDDPM_DEVICE DeviceTerm term(float x, float mean, float lv) {
    const ExactTerm term = exact_decoder_term(x, mean, lv);
    return {float(term.value), float(term.d_mean), float(term.d_lv)};
  }
};

}  // namespace iddpm
