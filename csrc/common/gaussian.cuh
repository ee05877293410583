// One element's term of the variational bound on the device; gaussian.h has the same for the CPU.
#pragma once

#include "common/cuda_compat.cuh"
#include "common/gaussian_exact.h"

namespace iddpm {

constexpr float kDeviceInverseLn2 = 1.4426950408889634f;

struct DeviceTerm {
  float value;
  float d_mean;          // by the model's mean
  float d_log_variance;  // by the model's log-variance
};

// KL(N(mean + difference, e^true_lv) || N(mean, e^lv)) in nats.
IDDPM_DEVICE DeviceTerm device_kl_term(float difference, float true_lv, float lv) {
  const float gap = true_lv - lv;
  const float pull = difference * expf(-lv);
  const float square = difference * pull;
  // The series where e^x - 1 - x would keep no digits.
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

struct DeviceCdf {
  float value, density;
};

IDDPM_DEVICE DeviceCdf device_cdf(float x) {
  x = x < -1e6f ? -1e6f : x > 1e6f ? 1e6f : x;
  const float k = 0.7978845608028654f, square = x * x;
  const float value = 1.0f / (1.0f + expf(-2.0f * k * x * (1.0f + 0.044715f * square)));
  return {value, 2.0f * k * value * (1.0f - value) * (1.0f + 0.134145f * square)};
}

// -log of the probability of x's bin, by the tanh approximation with its floor at 1e-12.
struct ApproximateLikelihood {
  static constexpr int kBlocks = 3;  // of 256 threads on a multiprocessor, so that nothing spills

  static IDDPM_DEVICE DeviceTerm term(float x, float mean, float lv) {
    const float half_bin = 1.0f / 255.0f, least = 1e-12f;
    const float inverse = expf(-0.5f * lv), centred = x - mean;
    const bool edge = x < -0.999f || x > 0.999f;
    const float side = (edge ? x > 0.0f : centred > 0.0f) ? -1.0f : 1.0f;
    const float upper = inverse * (side * centred + half_bin);
    const float lower = inverse * (side * centred - half_bin);
    const DeviceCdf right = device_cdf(upper);
    const DeviceCdf left = edge ? DeviceCdf{0.0f, 0.0f} : device_cdf(lower);
    const float probability = right.value - left.value;
    if (probability < least) return {-logf(least), 0.0f, 0.0f};
    return {-logf(probability), side * inverse * (right.density - left.density) / probability,
            0.5f * (right.density * upper - (edge ? 0.0f : left.density * lower)) / probability};
  }
};

// By the normal distribution function itself, in double: a kernel of its own, because few ask for
// it.
struct ExactLikelihood {
  static constexpr int kBlocks = 2;

  static IDDPM_DEVICE DeviceTerm term(float x, float mean, float lv) {
    const ExactTerm term = exact_decoder_term(x, mean, lv);
    return {float(term.value), float(term.d_mean), float(term.d_lv)};
  }
};

}  // namespace iddpm
