// One block per example: every thread adds its own elements in order, and the block adds the
// threads' sums in a fixed tree, so the bits of a term depend on the example alone. Value and
// gradient are computed in one pass.
#pragma once

#include "common/columns.h"
#include "common/gaussian.cuh"
#include "common/plane.cuh"
#include "vlb_terms/vlb_terms.h"

namespace iddpm {

constexpr int kVlbTermsThreads = 256;

template <typename T, bool kDense, typename Likelihood>
__global__ void __launch_bounds__(kVlbTermsThreads, Likelihood::kBlocks)
    vlb_terms_kernel(const VlbTermsArgs a) {
  IDDPM_SMEM(float, scratch, 32);
  const int64_t sample = blockIdx.x;
  const int64_t all = a.c * a.hw;
  const int64_t t = a.t[sample];
  const float* row = find_row(a.table, t, a.num_timesteps);
  const float poison = row ? 0.0f : NAN;
  if (!row) row = a.table;
  const float weight = kDeviceInverseLn2 / float(all);
  const float bias = row[kLogVarianceBias], scale = row[kLogVarianceScale];

  float nats = poison;
  for (int64_t at = 4 * int64_t(threadIdx.x); at < all; at += 4 * kVlbTermsThreads) {
    float out[4], v[4] = {}, x_0[4], x_t[4], d_out[4], d_v[4];
    read4<T, kDense>(a.model_output, a.hw, sample, at, all, out);
    if (a.learned_variance) read4<T, kDense>(a.model_output, a.hw, sample, all + at, 2 * all, v);
    read4<float, kDense>(a.x_0, a.hw, sample, at, all, x_0);
    read4<float, kDense>(a.x_t, a.hw, sample, at, all, x_t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float raw = row[kX0FromXt] * x_t[i] + row[kX0FromOut] * out[i];
      const bool inside = raw >= -1.0f && raw <= 1.0f;
      const float predicted = !a.clip ? raw : raw < -1.0f ? -1.0f : raw > 1.0f ? 1.0f : raw;
      const float lv = bias + scale * v[i];
      const float mean = row[kMeanX0] * predicted + row[kMeanXt] * x_t[i];
      const DeviceTerm term = t != 0 ? device_kl_term(row[kMeanX0] * (x_0[i] - predicted),
                                                      row[kPosteriorLogVariance], lv)
                                     : Likelihood::term(x_0[i], mean, lv);
      if (at + i < all) nats += term.value;
      d_out[i] =
          a.clip && !inside ? 0.0f : term.d_mean * row[kMeanX0] * row[kX0FromOut] * weight + poison;
      d_v[i] = term.d_log_variance * scale * weight + poison;
    }
    if (a.gradient.data != nullptr) {
      write4<kDense, T>(a.gradient, a.hw, sample, at, all, d_out);
      if (a.learned_variance) write4<kDense, T>(a.gradient, a.hw, sample, all + at, 2 * all, d_v);
    }
  }
  nats = block_sum(nats, scratch);
  if (threadIdx.x == 0) a.terms[sample] = nats * weight;
}

template <typename T>
void vlb_terms_launch(const VlbTermsArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.n)), block(kVlbTermsThreads);
  const bool dense = (a.c * a.hw) % 4 == 0 &&
                     moves_in_vectors(a.model_output, a.hw, 4 * sizeof(T)) &&
                     moves_in_vectors(a.gradient, a.hw, 4 * sizeof(T)) &&
                     moves_in_vectors(a.x_0, a.hw, 16) && moves_in_vectors(a.x_t, a.hw, 16);
  // Only one variant of the exact kernel, whose time is dominated by double precision.
  if (a.exact)
    IDDPM_LAUNCH((vlb_terms_kernel<T, false, ExactLikelihood>), grid, block, 0, stream, a);
  else if (dense)
    IDDPM_LAUNCH((vlb_terms_kernel<T, true, ApproximateLikelihood>), grid, block, 0, stream, a);
  else
    IDDPM_LAUNCH((vlb_terms_kernel<T, false, ApproximateLikelihood>), grid, block, 0, stream, a);
}

}  // namespace iddpm
