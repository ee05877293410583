// One thread computes four consecutive elements of one sample, as in reverse_step.cuh.
#pragma once

#include "common/columns.h"
#include "common/noise.cuh"
#include "common/plane.cuh"
#include "q_sample/q_sample.h"

namespace iddpm {

constexpr int kQSampleThreads = 256;

template <bool kDense>
__global__ void __launch_bounds__(kQSampleThreads)
    q_sample_kernel(const QSampleArgs a, const int64_t blocks_per_sample) {
  const int64_t block = blockIdx.x;
  const int64_t sample = block / blocks_per_sample;
  const int64_t all = a.c * a.hw;
  const int64_t at = 4 * ((block - sample * blocks_per_sample) * kQSampleThreads + threadIdx.x);
  if (at >= all) return;

  const float* row = find_row(a.table, a.t[sample], a.num_timesteps);
  const float signal = row ? row[kSqrtAlphaBar] : NAN;
  const float deviation = row ? row[kSqrtOneMinusAlphaBar] : NAN;
  float x[4], z[4], result[4];
  read4<float, kDense>(a.x_0, a.hw, sample, at, all, x);
  noise4<kDense>(a.noise, a.key, a.hw, sample, at, all, z);
#pragma unroll
  for (int i = 0; i < 4; ++i) result[i] = signal * x[i] + deviation * z[i];
  write4<kDense>(a.x_t, a.hw, sample, at, all, result);
}

inline void q_sample_launch(const QSampleArgs& a, void* stream) {
  const int64_t all = a.c * a.hw;
  const int64_t per_sample = (all + 4 * kQSampleThreads - 1) / (4 * kQSampleThreads);
  const dim3 grid(static_cast<unsigned>(a.n * per_sample));
  const bool dense = all % 4 == 0 && moves_in_vectors(a.x_0, a.hw, 16) &&
                     moves_in_vectors(a.noise, a.hw, 16) && moves_in_vectors(a.x_t, a.hw, 16);
  if (dense)
    IDDPM_LAUNCH(q_sample_kernel<true>, grid, dim3(kQSampleThreads), 0, stream, a, per_sample);
  else
    IDDPM_LAUNCH(q_sample_kernel<false>, grid, dim3(kQSampleThreads), 0, stream, a, per_sample);
}

}  // namespace iddpm
