// As reverse_step.cuh, for one t, in place, after classifier-free guidance: the guided output is
// unlabelled + scale (labelled - unlabelled), with the variance of the labelled one.
#pragma once

#include "reverse_step/chain_step.h"
#include "reverse_step/reverse_step.cuh"

namespace iddpm {

template <typename T, bool kDense>
__global__ void __launch_bounds__(kReverseStepThreads)
    chain_step_kernel(const ChainStepArgs a, const int64_t blocks_per_sample) {
  const int64_t block = blockIdx.x;
  const int64_t sample = block / blocks_per_sample;
  const int64_t all = a.c * a.hw;
  const int64_t at = 4 * ((block - sample * blocks_per_sample) * kReverseStepThreads + threadIdx.x);
  if (at >= all) return;

  const int64_t t = *a.t;
  const bool known = t >= 0 && t < a.num_timesteps;
  const float* row = a.table + (known ? t : 0) * kNumColumns;
  const float poison = known ? 0.0f : NAN;
  const float noise_scale = row[kNoiseScale] + poison;
  const bool noisy = a.samples && noise_scale != 0.0f;

  float x[4], out[4], v[4] = {}, x_0[4], prev[4];
  read4<float, kDense>(a.x, a.hw, sample, at, all, x);
  read4<T, kDense>(a.model_output, a.hw, sample, at, all, out);
  if (a.unlabelled.data) {
    float plain[4];
    read4<T, kDense>(a.unlabelled, a.hw, sample, at, all, plain);
    const float scale = *a.scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = plain[i] + scale * (out[i] - plain[i]);
  }
  if (noisy && a.learned_variance)
    read4<T, kDense>(a.model_output, a.hw, sample, all + at, 2 * all, v);
  affine_step(row, poison, a.clip, x, out, x_0, prev);
  if (noisy) {
    // The last column is the step's index in the training chain, exact below 2^24.
    const Normal4 z = normal4(static_cast<uint64_t>(*a.seed), uint32_t(at / 4),
                              uint32_t(a.samples[sample]), uint32_t(row[kStep]), a.stream_draw);
    add_noise(row, noise_scale, v, z.z, prev);
  }
  write4<kDense>(a.x, a.hw, sample, at, all, prev);
}

template <typename T>
void chain_step_launch(const ChainStepArgs& a, void* stream) {
  const int64_t all = a.c * a.hw;
  const int64_t per_sample = (all + 4 * kReverseStepThreads - 1) / (4 * kReverseStepThreads);
  const dim3 grid(static_cast<unsigned>(a.n * per_sample));
  const bool dense = all % 4 == 0 && moves_in_vectors(a.x, a.hw, 16) &&
                     moves_in_vectors(a.model_output, a.hw, 4 * sizeof(T)) &&
                     moves_in_vectors(a.unlabelled, a.hw, 4 * sizeof(T));
  if (dense)
    IDDPM_LAUNCH((chain_step_kernel<T, true>), grid, dim3(kReverseStepThreads), 0, stream, a,
                 per_sample);
  else
    IDDPM_LAUNCH((chain_step_kernel<T, false>), grid, dim3(kReverseStepThreads), 0, stream, a,
                 per_sample);
}

}  // namespace iddpm
