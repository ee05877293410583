// GroupNorm, scale-shift and SiLU over NHWC, in two passes: statistics by channel, then one fused y
// = a x + b.
//
// A chunk of pixels gives each channel's mean and centred sum of squares (sums of differences from
// the chunk's first pixel, so a mean far from zero costs no digits); chunks and channels are
// combined in float64 by Chan's rule. Chunks depend on the shape alone, so the result does not
// depend on the number of threads.
#if defined(__AVX2__)
#include "common/simd_math.h"
#include "unet_engine/plan.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

// means[c], squares[c]: mean and centred sum of squares of `pixels` values a channel.
void chunk_statistics(const float* x, int64_t stride, int64_t pixels, int64_t channels,
                      float* means, float* squares) {
  constexpr int V = 2;
  const float inverse = 1.0f / float(pixels);
  for (int64_t c = 0; c < channels; c += V * kWidth) {
    nv origin[V], sum[V] = {}, square[V] = {};
    IDDPM_UNROLL
    for (int j = 0; j < V; ++j) origin[j] = load<nv>(x + c + j * kWidth);
    const float* pixel = x + c;
    for (int64_t p = 0; p < pixels; ++p, pixel += stride) {
      IDDPM_UNROLL
      for (int j = 0; j < V; ++j) {
        const nv d = load<nv>(pixel + j * kWidth) - origin[j];
        sum[j] += d;
        square[j] += d * d;
      }
    }
    IDDPM_UNROLL
    for (int j = 0; j < V; ++j) {
      const nv mean = sum[j] * inverse;
      store(means + c + j * kWidth, origin[j] + mean);
      store(squares + c + j * kWidth, square[j] - sum[j] * mean);
    }
  }
}

struct Moments {
  double count, mean, squares;
};

inline void combine(Moments& total, double count, double mean, double squares) {
  const double delta = mean - total.mean, sum = total.count + count;
  total.mean += delta * count / sum;
  total.squares += squares + delta * delta * total.count * count / sum;
  total.count = sum;
}

// slope[c], offset[c] of y = slope x + offset for the channels of one group of one sample.
void fold_group(const GroupNormOp& op, const float* statistics, int64_t chunks, int64_t group,
                const float* embedding, float* slope, float* offset) {
  const int64_t width = op.channels / op.groups, first = group * width;
  const bool added = embedding && op.mode == 0;
  Moments total{0, 0, 0};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t count = smaller(kGroupNormChunk, op.pixels - chunk * kGroupNormChunk);
    const float* means = statistics + chunk * 2 * op.channels;
    for (int64_t c = first; c < first + width; ++c) {
      const double mean = double(means[c]) + (added ? double(embedding[c]) : 0.0);
      combine(total, double(count), mean, double(means[op.channels + c]));
    }
  }
  const double deviation = __builtin_sqrt(total.squares / total.count + op.eps);
  for (int64_t c = first; c < first + width; ++c) {
    double a = double(op.weight[c]) / deviation;
    double b = double(op.bias[c]) + a * ((added ? double(embedding[c]) : 0.0) - total.mean);
    if (embedding && op.mode == 1) {
      const double scale = 1.0 + double(embedding[c]);
      a *= scale;
      b = b * scale + double(embedding[op.channels + c]);
    }
    slope[c] = float(a);
    offset[c] = float(b);
  }
}

template <bool Silu>
void apply(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t pixels,
           int64_t channels, const float* slope, const float* offset) {
  for (int64_t p = 0; p < pixels; ++p, x += x_stride, y += y_stride) {
    for (int64_t c = 0; c < channels; c += kWidth) {
      const nv v = load<nv>(x + c) * load<nv>(slope + c) + load<nv>(offset + c);
      store(y + c, Silu ? silu(v) : v);
    }
  }
}

}  // namespace

int run_group_norm(const GroupNormOp& op, const PlanRun& run, const Team& team) {
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
  Range rows = share(team.n * op.pixels, 4, team.thread, team.threads);
  while (rows.begin < rows.end) {
    const int64_t sample = rows.begin / op.pixels;
    const int64_t end = smaller(rows.end, (sample + 1) * op.pixels);
    const float* slope = team.shared + sample * per_sample + chunks * 2 * channels;
    (op.silu ? apply<true> : apply<false>)(op.in + rows.begin * op.in_stride, op.in_stride,
                                           op.out + rows.begin * op.out_stride, op.out_stride,
                                           end - rows.begin, channels, slope, slope + channels);
    rows.begin = end;
  }
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
