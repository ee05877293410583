// Shared by the CPU's forward and backward pass: addresses of channels, and the affine map of each.
#pragma once

#include "common/lanes.h"
#include "common/simd_coarse.h"
#include "common/threads.h"
#include "group_norm_silu/group_norm_silu.h"

namespace iddpm {
namespace IDDPM_ISA {

// Whether values of 13 bits are as good as exact ones, as what follows rounds them to fewer, and
// where that is faster.
template <typename T>
constexpr bool kRoundsAway = false;
#if defined(__AVX512BF16__)
template <>
inline constexpr bool kRoundsAway<BFloat16> = true;
#endif

// Where a team of threads would cost more than it brings.
IDDPM_INLINE bool runs_alone(const GroupNormInput& in) { return in.n * in.c * in.hw < 32768; }

template <typename T>
IDDPM_INLINE T* at(const Plane& plane, int64_t n, int64_t channel, int64_t pixel) {
  return static_cast<T*>(plane.data) + n * plane.sample + channel * plane.channel +
         pixel * plane.pixel;
}

// Channel c of the concatenation of x and x2.
template <typename T>
IDDPM_INLINE T* at(const Plane& x, const Plane& x2, int64_t c1, int64_t n, int64_t c,
                   int64_t pixel) {
  return c < c1 ? at<T>(x, n, c, pixel) : at<T>(x2, n, c - c1, pixel);
}

IDDPM_INLINE float channel_bias(const GroupNormInput& in, int64_t n, int64_t c) {
  return in.channel_bias && c < in.c1 ? in.channel_bias[n * in.channel_bias_stride + c] : 0.0f;
}

// The factor of the normalised values and the bias: 1 + scale.
IDDPM_INLINE double modulation(const GroupNormInput& in, int64_t n, int64_t c) {
  return in.scale ? 1.0 + double(in.scale[n * in.scale_stride + c]) : 1.0;
}

// y = (x - centre) * gain + offset, before SiLU. x is centred first: for a mean of a thousand
// standard deviations, x * gain + offset would lose three digits.
struct Affine {
  float centre, gain, offset;
};

IDDPM_INLINE Affine affine(const GroupNormInput& in, int64_t n, int64_t c, double mean, double rstd,
                           float channel_bias) {
  const double scale = modulation(in, n, c);
  const double shift = in.shift ? double(in.shift[n * in.shift_stride + c]) : 0.0;
  const double gain = in.weight[c] * scale * rstd, target = mean - double(channel_bias);
  const float centre = float(target);
  const double offset = in.bias[c] * scale + shift - gain * (target - double(centre));
  return {centre, float(gain), float(offset)};
}

// The pixels of slab number s.
struct Span {
  int64_t first, count;
};

IDDPM_INLINE Span slab_span(const GroupNormInput& in, int64_t s) {
  const int64_t first = s * kGroupNormSlab, rest = in.hw - first;
  return {first, rest < kGroupNormSlab ? rest : kGroupNormSlab};
}

template <int k>
struct Vectors {
  static constexpr int kVectors = k;
};

// Calls f(vectors, first channel, lanes) for channels [first, end): kWide vectors, one, and a rest.
template <int kWide, typename F>
IDDPM_INLINE void for_columns(int64_t first, int64_t end, F f) {
  int64_t c = first;
  for (; c + kWide * kLanes <= end; c += kWide * kLanes) f(Vectors<kWide>{}, c, kLanes);
  for (; c < end; c += kLanes) f(Vectors<1>{}, c, end - c < kLanes ? end - c : kLanes);
}

// Runs three steps over a batch: `first` for all slabs, `once` per sample, `last` for all slabs. If
// each thread has its own samples, a sample stays in the cache from step to step.
template <typename First, typename Once, typename Last>
IDDPM_INLINE void for_slabs(const GroupNormInput& in, int num_threads, First first, Once once,
                            Last last) {
  const int64_t slabs = group_norm_slabs(in);
  if (runs_alone(in) || in.n >= num_threads) {
    for_jobs(in.n, num_threads, runs_alone(in), [&](int64_t n) {
      for (int64_t s = 0; s < slabs; ++s) first(n, s);
      once(n);
      for (int64_t s = 0; s < slabs; ++s) last(n, s);
    });
    return;
  }
  const int64_t jobs = in.n * slabs;
  for_jobs(jobs, num_threads, false, [&](int64_t job) { first(job / slabs, job % slabs); });
  for (int64_t n = 0; n < in.n; ++n) once(n);
  for_jobs(jobs, num_threads, false, [&](int64_t job) { last(job / slabs, job % slabs); });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
