// One block per example, as in vlb_terms.cuh.
#pragma once

#include "common/columns.h"
#include "common/gaussian.cuh"
#include "common/noise.cuh"
#include "common/plane.cuh"
#include "hybrid_loss/hybrid_loss.h"

namespace iddpm {

constexpr int kHybridLossThreads = 256;

template <typename T, bool kDense>
__global__ void __launch_bounds__(kHybridLossThreads, 3)
    hybrid_loss_kernel(const HybridLossArgs a) {
  IDDPM_SMEM(float, scratch, 32);
  const int64_t sample = blockIdx.x;
  const int64_t all = a.c * a.hw;
  const int64_t t = a.t[sample];
  const float* row = find_row(a.table, t, a.num_timesteps);
  const float poison = row ? 0.0f : NAN;
  if (!row) row = a.table;
  const float inverse_all = 1.0f / float(all);
  const float bias = row[kLogVarianceBias], scale = row[kLogVarianceScale];

  float squares = poison, nats = poison;
  for (int64_t at = 4 * int64_t(threadIdx.x); at < all; at += 4 * kHybridLossThreads) {
    float out[4], v[4], x_0[4], x_t[4], z[4], d_out[4], d_v[4];
    read4<T, kDense>(a.model_output, a.hw, sample, at, all, out);
    read4<T, kDense>(a.model_output, a.hw, sample, all + at, 2 * all, v);
    read4<float, kDense>(a.x_0, a.hw, sample, at, all, x_0);
    read4<float, kDense>(a.x_t, a.hw, sample, at, all, x_t);
    noise4<kDense>(a.noise, a.key, a.hw, sample, at, all, z);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float error =
          out[i] - (row[kTargetX0] * x_0[i] + row[kTargetXt] * x_t[i] + row[kTargetNoise] * z[i]);
      const float predicted = row[kX0FromXt] * x_t[i] + row[kX0FromOut] * out[i];
      const float lv = bias + scale * v[i];
      const DeviceTerm term =
          t != 0
              ? device_kl_term(row[kMeanX0] * (x_0[i] - predicted), row[kPosteriorLogVariance], lv)
              : ApproximateLikelihood::term(x_0[i],
                                            row[kMeanX0] * predicted + row[kMeanXt] * x_t[i], lv);
      if (at + i < all) {
        squares += error * error;
        nats += term.value;
      }
      d_out[i] = 2.0f * inverse_all * error + poison;
      d_v[i] = term.d_log_variance * scale * (kDeviceInverseLn2 * inverse_all) + poison;
    }
    if (a.gradient.data != nullptr) {
      write4<kDense, T>(a.gradient, a.hw, sample, at, all, d_out);
      write4<kDense, T>(a.gradient, a.hw, sample, all + at, 2 * all, d_v);
    }
  }
  squares = block_sum(squares, scratch);
  nats = block_sum(nats, scratch);
  if (threadIdx.x == 0) {
    a.mse[sample] = squares * inverse_all;
    a.vlb[sample] = nats * inverse_all * kDeviceInverseLn2;
  }
}

template <typename T>
void hybrid_loss_launch(const HybridLossArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.n)), block(kHybridLossThreads);
  const bool dense =
      (a.c * a.hw) % 4 == 0 && moves_in_vectors(a.model_output, a.hw, 4 * sizeof(T)) &&
      moves_in_vectors(a.gradient, a.hw, 4 * sizeof(T)) && moves_in_vectors(a.x_0, a.hw, 16) &&
      moves_in_vectors(a.x_t, a.hw, 16) && moves_in_vectors(a.noise, a.hw, 16);
  if (dense)
    IDDPM_LAUNCH((hybrid_loss_kernel<T, true>), grid, block, 0, stream, a);
  else
    IDDPM_LAUNCH((hybrid_loss_kernel<T, false>), grid, block, 0, stream, a);
}

}  // namespace iddpm
