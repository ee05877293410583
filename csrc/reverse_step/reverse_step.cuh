// One thread computes four consecutive elements (one Philox counter) of one sample; a block stays
// within a sample, so that its coefficients are read once. kDense: every plane is contiguous and C
// * HW is a multiple of four, so that all accesses are vectors; otherwise each element is addressed
// by the strides.
#pragma once

#include "common/columns.h"
#include "common/noise.cuh"
#include "common/plane.cuh"
#include "reverse_step/reverse_step.h"

namespace iddpm {

constexpr int kReverseStepThreads = 256;

// x_0 and the mean of x_{t-1} of four elements; both are NaN if `poison` is.
IDDPM_DEVICE void affine_step(const float* row, float poison, bool clip, const float (&x)[4],
                              const float (&out)[4], float (&x_0)[4], float (&prev)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x_0[i] = (row[kX0FromXt] + poison) * x[i] + row[kX0FromOut] * out[i];
    // Comparisons, not fminf and fmaxf: those would replace NaN by the bound.
    if (clip) x_0[i] = x_0[i] < -1.0f ? -1.0f : x_0[i] > 1.0f ? 1.0f : x_0[i];
    prev[i] = row[kMeanX0] * x_0[i] + row[kMeanXt] * x[i];
  }
}

IDDPM_DEVICE void add_noise(const float* row, float noise_scale, const float (&v)[4],
                            const float (&z)[4], float (&prev)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float log_variance = row[kLogVarianceBias] + row[kLogVarianceScale] * v[i];
    prev[i] += noise_scale * expf(0.5f * log_variance) * z[i];
  }
}

template <typename T, bool kDense>
__global__ void __launch_bounds__(kReverseStepThreads)
    reverse_step_kernel(const ReverseStepArgs a, const int64_t blocks_per_sample) {
  const int64_t block = blockIdx.x;
  const int64_t sample = block / blocks_per_sample;
  const int64_t all = a.c * a.hw;
  const int64_t at = 4 * ((block - sample * blocks_per_sample) * kReverseStepThreads + threadIdx.x);
  if (at >= all) return;

  const int64_t t = a.t[sample];
  const bool known = t >= 0 && t < a.num_timesteps;
  const float* row = a.table + (known ? t : 0) * kNumColumns;
  const float poison = known ? 0.0f : NAN;
  const float noise_scale = row[kNoiseScale] + poison;
  const bool noisy = (a.key.samples || a.noise.data) && noise_scale != 0.0f;

  float x[4], out[4], v[4] = {}, x_0[4], prev[4];
  read4<float, kDense>(a.x_t, a.hw, sample, at, all, x);
  read4<T, kDense>(a.model_output, a.hw, sample, at, all, out);
  if (noisy && a.learned_variance)
    read4<T, kDense>(a.model_output, a.hw, sample, all + at, 2 * all, v);
  affine_step(row, poison, a.clip, x, out, x_0, prev);
  if (noisy) {
    float z[4];
    noise4<kDense>(a.noise, a.key, a.hw, sample, at, all, z);
    add_noise(row, noise_scale, v, z, prev);
  }
  write4<kDense>(a.x_prev, a.hw, sample, at, all, prev);
  write4<kDense>(a.x_0, a.hw, sample, at, all, x_0);
}

template <typename T>
void reverse_step_launch(const ReverseStepArgs& a, void* stream) {
  const int64_t all = a.c * a.hw;
  const int64_t per_sample = (all + 4 * kReverseStepThreads - 1) / (4 * kReverseStepThreads);
  const dim3 grid(static_cast<unsigned>(a.n * per_sample));
  const bool dense = all % 4 == 0 && moves_in_vectors(a.x_t, a.hw, 16) &&
                     moves_in_vectors(a.model_output, a.hw, 4 * sizeof(T)) &&
                     moves_in_vectors(a.noise, a.hw, 16) && moves_in_vectors(a.x_prev, a.hw, 16) &&
                     moves_in_vectors(a.x_0, a.hw, 16);
  if (dense)
    IDDPM_LAUNCH((reverse_step_kernel<T, true>), grid, dim3(kReverseStepThreads), 0, stream, a,
                 per_sample);
  else
    IDDPM_LAUNCH((reverse_step_kernel<T, false>), grid, dim3(kReverseStepThreads), 0, stream, a,
                 per_sample);
}

}  // namespace iddpm
