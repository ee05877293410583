// One thread computes four consecutive elements (one Philox counter) of one sample; a block stays
// within a sample, so its coefficients are read once. kDense: every plane lies in NCHW order and C
// * HW divides by four, so that all traffic moves in vectors; otherwise each element is addressed
// through the strides.
#pragma once

#include "common/columns.h"
#include "common/noise.cuh"
#include "reverse_step/reverse_step.h"

namespace iddpm {

constexpr int kReverseStepThreads = 256;

// Element `at` (NCHW order) of a sample; `channel` counts past C for the variance head.
IDDPM_DEVICE int64_t reverse_step_offset(const Plane& plane, int64_t hw, int64_t sample,
                                         int64_t at) {
  const int64_t channel = at / hw;
  return sample * plane.sample + channel * plane.channel + (at - channel * hw) * plane.pixel;
}

template <typename T, bool kDense>
IDDPM_DEVICE void reverse_step_read(const Plane& plane, int64_t hw, int64_t sample, int64_t at,
                                    int64_t end, float (&values)[4]) {
  const T* data = static_cast<const T*>(plane.data);
  if constexpr (kDense) {
    load_floats<T, 4>(data + sample * plane.sample + at, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      values[i] =
          at + i < end ? to_float(data[reverse_step_offset(plane, hw, sample, at + i)]) : 0.0f;
  }
}

template <bool kDense>
IDDPM_DEVICE void reverse_step_write(const Plane& plane, int64_t hw, int64_t sample, int64_t at,
                                     int64_t end, const float (&values)[4]) {
  float* data = static_cast<float*>(plane.data);
  if constexpr (kDense) {
    store_floats<float, 4>(data + sample * plane.sample + at, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < end) data[reverse_step_offset(plane, hw, sample, at + i)] = values[i];
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
  const bool drawn = a.key.samples != nullptr;
  const bool noisy = (drawn || a.noise.data != nullptr) && noise_scale != 0.0f;

  float x[4], out[4], v[4] = {}, x_0[4], prev[4];
  reverse_step_read<float, kDense>(a.x_t, a.hw, sample, at, all, x);
  reverse_step_read<T, kDense>(a.model_output, a.hw, sample, at, all, out);
  if (noisy && a.learned_variance)
    reverse_step_read<T, kDense>(a.model_output, a.hw, sample, all + at, 2 * all, v);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x_0[i] = (row[kX0FromXt] + poison) * x[i] + row[kX0FromOut] * out[i];
    // Comparisons, not fminf and fmaxf: those would replace NaN by the bound.
    if (a.clip) x_0[i] = x_0[i] < -1.0f ? -1.0f : x_0[i] > 1.0f ? 1.0f : x_0[i];
    prev[i] = row[kMeanX0] * x_0[i] + row[kMeanXt] * x[i];
  }
  if (noisy) {
    float z[4];
    if (drawn) {
      const Normal4 normal = normal4(a.key.seed, uint32_t(at / 4), uint32_t(a.key.samples[sample]),
                                     uint32_t(a.key.steps[sample]), a.key.stream_draw);
#pragma unroll
      for (int i = 0; i < 4; ++i) z[i] = normal.z[i];
    } else {
      reverse_step_read<float, kDense>(a.noise, a.hw, sample, at, all, z);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float log_variance = row[kLogVarianceBias] + row[kLogVarianceScale] * v[i];
      prev[i] += noise_scale * expf(0.5f * log_variance) * z[i];
    }
  }
  reverse_step_write<kDense>(a.x_prev, a.hw, sample, at, all, prev);
  reverse_step_write<kDense>(a.x_0, a.hw, sample, at, all, x_0);
}

// Whether four consecutive elements of a sample can move as one vector of `bytes` bytes.
inline bool reverse_step_vectors(const Plane& plane, int64_t hw, int64_t bytes) {
  return plane.data == nullptr || (plane.dense(hw) && plane.sample % 4 == 0 &&
                                   reinterpret_cast<uintptr_t>(plane.data) % bytes == 0);
}

template <typename T>
void reverse_step_launch(const ReverseStepArgs& a, void* stream) {
  const int64_t all = a.c * a.hw;
  const int64_t per_sample = (all + 4 * kReverseStepThreads - 1) / (4 * kReverseStepThreads);
  const dim3 grid(static_cast<unsigned>(a.n * per_sample));
  const bool dense = all % 4 == 0 && reverse_step_vectors(a.x_t, a.hw, 16) &&
                     reverse_step_vectors(a.model_output, a.hw, 4 * sizeof(T)) &&
                     reverse_step_vectors(a.noise, a.hw, 16) &&
                     reverse_step_vectors(a.x_prev, a.hw, 16) &&
                     reverse_step_vectors(a.x_0, a.hw, 16);
  if (dense)
    IDDPM_LAUNCH((reverse_step_kernel<T, true>), grid, dim3(kReverseStepThreads), 0, stream, a,
                 per_sample);
  else
    IDDPM_LAUNCH((reverse_step_kernel<T, false>), grid, dim3(kReverseStepThreads), 0, stream, a,
                 per_sample);
}

}  // namespace iddpm
