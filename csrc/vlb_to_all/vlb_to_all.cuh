// One warp per jump: its lanes add their own elements in order, and then each other's in a fixed
// tree. The warps of a block take neighbouring targets of one sample, and share its images in the
// cache.
#pragma once

#include "common/columns.h"
#include "common/gaussian.cuh"
#include "common/plane.cuh"
#include "vlb_to_all/vlb_to_all.h"

namespace iddpm {

constexpr int kVlbToAllThreads = 256;

// Four consecutive elements of a dense row of `end`; aligned ones move at once.
template <bool kAligned>
IDDPM_DEVICE void read_row(const float* row, int64_t at, int64_t end, float (&values)[4]) {
  if constexpr (kAligned) {
    load_floats<float, 4>(row + at, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = at + i < end ? row[at + i] : 0.0f;
  }
}

IDDPM_DEVICE const float* sample_of(const Plane& plane, int64_t sample) {
  return static_cast<const float*>(plane.data) + sample * plane.sample;
}

template <bool kAligned, typename Likelihood>
__global__ void __launch_bounds__(kVlbToAllThreads, Likelihood::kBlocks)
    vlb_to_all_kernel(const VlbToAllArgs a, const int64_t blocks_per_sample) {
  constexpr int kWarps = kVlbToAllThreads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t block = blockIdx.x, sample = block / blocks_per_sample;
  const int64_t target = (block - sample * blocks_per_sample) * kWarps + warp;
  if (target >= a.num_targets) return;
  const float* row = a.rows + (sample * a.num_targets + target) * kNumColumns;
  const bool decoder = a.targets[target] < 0;
  const float x0_from_xt = row[kX0FromXt], x0_from_out = row[kX0FromOut];
  const float mean_x0 = row[kMeanX0], mean_xt = row[kMeanXt];
  const float bias = row[kLogVarianceBias], scale = row[kLogVarianceScale];
  const float true_lv = row[kPosteriorLogVariance];

  const float* out_row = sample_of(a.model_output, sample);
  const float *x_0_row = sample_of(a.x_0, sample), *x_t_row = sample_of(a.x_t, sample);

  // A row of NaN is an impossible jump: its term is NaN, and the images are not read.
  float nats = mean_x0 - mean_x0;
  const int64_t end = mean_x0 == mean_x0 ? a.count : 0;
  for (int64_t at = 4 * lane; at < end; at += 4 * 32) {
    float out[4], v[4] = {}, x_0[4], x_t[4];
    read_row<kAligned>(out_row, at, a.count, out);
    if (a.learned_variance) read_row<kAligned>(out_row + a.count, at, a.count, v);
    read_row<kAligned>(x_0_row, at, a.count, x_0);
    read_row<kAligned>(x_t_row, at, a.count, x_t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float raw = x0_from_xt * x_t[i] + x0_from_out * out[i];
      const float predicted = !a.clip ? raw : raw < -1.0f ? -1.0f : raw > 1.0f ? 1.0f : raw;
      const float lv = bias + scale * v[i];
      const float value =
          decoder ? Likelihood::term(x_0[i], mean_x0 * predicted + mean_xt * x_t[i], lv).value
                  : device_kl_term(mean_x0 * (x_0[i] - predicted), true_lv, lv).value;
      if (at + i < a.count) nats += value;
    }
  }
  nats = warp_sum(nats);
  if (lane == 0)
    a.terms[sample * a.num_targets + target] = nats * (kDeviceInverseLn2 / float(a.count));
}

inline void vlb_to_all_launch(const VlbToAllArgs& a, void* stream) {
  constexpr int kWarps = kVlbToAllThreads / 32;
  const int64_t per_sample = (a.num_targets + kWarps - 1) / kWarps;
  const dim3 grid(static_cast<unsigned>(a.n * per_sample)), block(kVlbToAllThreads);
  const bool aligned = a.count % 4 == 0 && moves_in_vectors(a.model_output, a.count, 16) &&
                       moves_in_vectors(a.x_0, a.count, 16) && moves_in_vectors(a.x_t, a.count, 16);
  if (a.exact)
    IDDPM_LAUNCH((vlb_to_all_kernel<false, ExactLikelihood>), grid, block, 0, stream, a,
                 per_sample);
  else if (aligned)
    IDDPM_LAUNCH((vlb_to_all_kernel<true, ApproximateLikelihood>), grid, block, 0, stream, a,
                 per_sample);
  else
    IDDPM_LAUNCH((vlb_to_all_kernel<false, ApproximateLikelihood>), grid, block, 0, stream, a,
                 per_sample);
}

}  // namespace iddpm
