// GroupNorm, scale-shift and SiLU over NHWC, in two passes: statistics by channel, then one fused y
// = a x + b.
//
// For each chunk of pixels, every channel's mean and centred sum of squares are computed from
// differences to the chunk's first pixel, so that a mean far from zero costs no digits. Chunks and
// channels are combined in float64: first the mean, then the squares about it. Chunks depend on the
// shape alone, so the result does not depend on the number of threads.
#pragma once

#include "common/simd_math.h"
#include "unet_engine/plan.h"

namespace iddpm {
namespace IDDPM_ISA {

// means[c], squares[c]: mean and centred sum of squares over `pixels` values per channel, for V
// vectors of channels.
template <int V>
IDDPM_INLINE void chunk_statistics(const float* x, int64_t stride, int64_t pixels, float* means,
                                   float* squares) {
  const float inverse = 1.0f / float(pixels);
  nv origin[V], sum[V] = {}, square[V] = {};
  IDDPM_UNROLL
  for (int j = 0; j < V; ++j) origin[j] = load<nv>(x + j * kWidth);
  for (int64_t p = 0; p < pixels; ++p, x += stride) {
    IDDPM_UNROLL
    for (int j = 0; j < V; ++j) {
      const nv d = load<nv>(x + j * kWidth) - origin[j];
      sum[j] += d;
      square[j] += d * d;
    }
  }
  IDDPM_UNROLL
  for (int j = 0; j < V; ++j) {
    const nv mean = sum[j] * inverse;
    store(means + j * kWidth, origin[j] + mean);
    store(squares + j * kWidth, square[j] - sum[j] * mean);
  }
}

static void chunk_statistics(const float* x, int64_t stride, int64_t pixels, int64_t channels,
                             float* means, float* squares) {
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 8 * kWidth <= channels; c += 8 * kWidth)
    chunk_statistics<8>(x + c, stride, pixels, means + c, squares + c);
#endif
  for (; c < channels; c += 2 * kWidth)
    chunk_statistics<2>(x + c, stride, pixels, means + c, squares + c);
}

// slope[c], offset[c] of y = slope x + offset for the channels of one group of one sample.
static void fold_group(const Normalization& op, const float* statistics, int64_t chunks,
                       int64_t group, const float* embedding, float* slope, float* offset) {
  const int64_t width = op.channels / op.groups, first = group * width;
  const bool added = embedding && op.mode == 0;
  // Sums over the channels, so that there are divisions for the group only.
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double count = double(smaller(kGroupNormChunk, op.pixels - chunk * kGroupNormChunk));
    const float* means = statistics + chunk * 2 * op.channels;
    for (int64_t c = first; c < first + width; ++c)
      total += count * (double(means[c]) + (added ? double(embedding[c]) : 0.0));
  }
  const double values = double(op.pixels * width), mean = total / values;
  double squares = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double count = double(smaller(kGroupNormChunk, op.pixels - chunk * kGroupNormChunk));
    const float* means = statistics + chunk * 2 * op.channels;
    for (int64_t c = first; c < first + width; ++c) {
      const double gap = double(means[c]) + (added ? double(embedding[c]) : 0.0) - mean;
      squares += double(means[op.channels + c]) + count * gap * gap;
    }
  }
  const double inverse = 1.0 / __builtin_sqrt(squares / values + op.eps);
  for (int64_t c = first; c < first + width; ++c) {
    double a = double(op.weight[c]) * inverse;
    double b = double(op.bias[c]) + a * ((added ? double(embedding[c]) : 0.0) - mean);
    if (embedding && op.mode == 1) {
      const double scale = 1.0 + double(embedding[c]);
      a *= scale;
      b = b * scale + double(embedding[op.channels + c]);
    }
    slope[c] = float(a);
    offset[c] = float(b);
  }
}

// Computes statistics, slopes and offsets of every sample. Afterwards every thread can read the
// slopes at `slope_of(op, team, sample)`, and the offsets `channels` floats further.
static int fold_statistics(const Normalization& op, const PlanRun& run, const Team& team) {
  const int64_t chunks = divide_up(op.pixels, kGroupNormChunk), channels = op.channels;
  const int64_t per_sample = (chunks + 1) * 2 * channels;
  if (group_norm_shared(team.n, op.pixels, channels) > team.shared_floats) return 1;
  const Range statistics = share(team.n * chunks, 1, team.thread, team.threads);
  for (int64_t i = statistics.begin; i < statistics.end; ++i) {
    const int64_t sample = i / chunks, chunk = i % chunks;
    float* means = team.shared + sample * per_sample + chunk * 2 * channels;
    const int64_t first = chunk * kGroupNormChunk;
    chunk_statistics(op.in + (sample * op.pixels + first) * op.in_stride, op.in_stride,
                     smaller(kGroupNormChunk, op.pixels - first), channels, means,
                     means + channels);
  }
  barrier(team);
  const Range groups = share(team.n * op.groups, 1, team.thread, team.threads);
  for (int64_t i = groups.begin; i < groups.end; ++i) {
    const int64_t sample = i / op.groups;
    float* base = team.shared + sample * per_sample;
    float* slope = base + chunks * 2 * channels;
    const float* embedding =
        op.embedding < 0 ? nullptr : run.embedding + run.embedding_row[sample] + op.embedding;
    fold_group(op, base, chunks, i % op.groups, embedding, slope, slope + channels);
  }
  barrier(team);
  return 0;
}

static inline const float* slope_of(const Normalization& op, const Team& team, int64_t sample) {
  const int64_t chunks = divide_up(op.pixels, kGroupNormChunk);
  return team.shared + (sample * (chunks + 1) + chunks) * 2 * op.channels;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
