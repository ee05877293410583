// The forward pass, for element types and instruction sets.
#pragma once

#include "group_norm_silu/group_norm_cpu.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

// Elements whose mean is taken before their deviations from it: they stay in L1.
constexpr int64_t kRunChunk = 4096;
constexpr int64_t kPixelChunk = 32;

// ---- statistics: the mean of a chunk first, then the squares about it, chunks combined in float64

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void add(double other_count, double other_mean, double other_m2) {
    if (count == 0) {  // most groups have one part, and divisions take longer than small groups
      count = other_count, mean = other_mean, m2 = other_m2;
      return;
    }
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * other_count / total;
    m2 += other_m2 + delta * delta * count * other_count / total;
    count = total;
  }
};

template <typename T, typename F>
IDDPM_INLINE void for_vectors(const T* p, int64_t count, F f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) f(k, load(p + i + k * kLanes), kLanes);
  for (; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    f(0, load_some(p + i, lanes), lanes);
  }
}

// Adds `count` consecutive elements, each plus `bias`.
template <typename T>
void add_run(const T* p, int64_t count, float bias, Moments* moments) {
  for (int64_t first = 0; first < count; first += kRunChunk) {
    const int64_t chunk = count - first < kRunChunk ? count - first : kRunChunk;
    vf total[4] = {};
    for_vectors(p + first, chunk, [&](int k, vf v, int64_t) { total[k] += v; });
    const float mean = sum((total[0] + total[1]) + (total[2] + total[3])) / float(chunk);
    vf rest[4] = {}, squares[4] = {};
    for_vectors(p + first, chunk, [&](int k, vf v, int64_t lanes) {
      vf d = v - mean;
      if (lanes < kLanes) d = first_lanes(d, lanes);
      rest[k] += d;
      squares[k] += d * d;
    });
    // What rounding left in the mean, moved where it belongs.
    const double left = sum((rest[0] + rest[1]) + (rest[2] + rest[3]));
    const double m2 = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    moments->add(double(chunk), double(mean) + left / double(chunk) + double(bias),
                 m2 - left * left / double(chunk));
  }
}

void keep_statistics(const GroupNormInput& in, int64_t n, int64_t g, const Moments& moments,
                     float eps, double* rstd) {
  *rstd = 1.0 / __builtin_sqrt(moments.m2 / moments.count + double(eps));
  in.mean[n * in.groups + g] = float(moments.mean);
  in.rstd[n * in.groups + g] = float(*rstd);
}

template <typename T, bool kSilu>
IDDPM_INLINE vf finish(vf z) {
  if (!kSilu) return z;
  return kRoundsAway<T> ? silu_coarse(z) : silu(z);
}

// ---- NCHW: a channel is a row

template <typename T>
void add_row(const GroupNormSiluArgs& a, int64_t n, int64_t c) {
  const T* x = at<T>(a.in.x, n, c, 0);
  const T* residual = a.residual.data ? at<T>(a.residual, n, c, 0) : nullptr;
  T* sum = at<T>(a.sum, n, c, 0);
  const float bias = channel_bias(a.in, n, c);
  for (int64_t p = 0; p < a.in.hw; p += kLanes) {
    const int64_t lanes = a.in.hw - p < kLanes ? a.in.hw - p : kLanes;
    vf h = load_some(x + p, lanes) + bias;
    if (residual) h += load_some(residual + p, lanes);
    store_some(sum + p, h, lanes);
  }
}

template <typename T, bool kSilu>
IDDPM_INLINE void apply_row(const T* x, T* y, int64_t count, Affine k) {
  int64_t p = 0;
  for (; p + kLanes <= count; p += kLanes)
    store(y + p, finish<T, kSilu>((load(x + p) - k.centre) * k.gain + k.offset));
  if (p < count) {
    const vf v = load_some(x + p, count - p);
    store_some(y + p, finish<T, kSilu>((v - k.centre) * k.gain + k.offset), count - p);
  }
}

template <typename T>
void rows_of_group(const GroupNormSiluArgs& a, int64_t n, int64_t g) {
  const GroupNormInput& in = a.in;
  const int64_t width = in.c / in.groups, first = g * width, end = first + width;
  const bool summed = a.sum.data != nullptr;
  const Plane& x = summed ? a.sum : in.x;
  if (summed)
    for (int64_t c = first; c < end && c < in.c1; ++c) add_row<T>(a, n, c);

  Moments moments;
  const bool biased = in.channel_bias && !summed;
  const bool one_source = end <= in.c1 || first >= in.c1;
  if (!biased && one_source && (first < in.c1 ? x : in.x2).channel == in.hw) {
    add_run(at<T>(x, in.x2, in.c1, n, first, 0), width * in.hw, 0.0f, &moments);
  } else {
    for (int64_t c = first; c < end; ++c)
      add_run(at<T>(x, in.x2, in.c1, n, c, 0), in.hw, biased ? channel_bias(in, n, c) : 0.0f,
              &moments);
  }
  double rstd;
  keep_statistics(in, n, g, moments, a.eps, &rstd);
  for (int64_t c = first; c < end; ++c) {
    const Affine k = affine(in, n, c, moments.mean, rstd, biased ? channel_bias(in, n, c) : 0.0f);
    const T* from = at<T>(x, in.x2, in.c1, n, c, 0);
    T* to = at<T>(a.y, n, c, 0);
    if (in.silu)
      apply_row<T, true>(from, to, in.hw, k);
    else
      apply_row<T, false>(from, to, in.hw, k);
  }
}

// ---- channels_last: a pixel is a row, and a vector holds sixteen channels

template <typename T>
void add_pixels(const GroupNormSiluArgs& a, int64_t n, Span span) {
  for (int64_t p = span.first; p < span.first + span.count; ++p) {
    const T* x = at<T>(a.in.x, n, 0, p);
    const T* residual = a.residual.data ? at<T>(a.residual, n, 0, p) : nullptr;
    const float* bias =
        a.in.channel_bias ? a.in.channel_bias + n * a.in.channel_bias_stride : nullptr;
    T* sum = at<T>(a.sum, n, 0, p);
    for (int64_t c = 0; c < a.in.c1; c += kLanes) {
      const int64_t lanes = a.in.c1 - c < kLanes ? a.in.c1 - c : kLanes;
      vf h = load_some(x + c, lanes);
      if (bias) h += load_some(bias + c, lanes);
      if (residual) h += load_some(residual + c, lanes);
      store_some(sum + c, h, lanes);
    }
  }
}

// Per channel of kVectors * 16 columns: pivot + mean is the mean of the span, m2 the squares about
// it. Everything is relative to the pivot, the mean of the first chunk, so that nothing cancels.
template <typename T, int kVectors>
void column_moments(const T* p, int64_t pitch, int64_t count, int64_t lanes, float* pivot,
                    float* mean, float* m2) {
  if (kVectors > 1) lanes = kLanes;
  vf origin[kVectors] = {}, average[kVectors] = {}, squares[kVectors] = {};
  for (int64_t first = 0; first < count; first += kPixelChunk) {
    const int64_t chunk = count - first < kPixelChunk ? count - first : kPixelChunk;
    const T* start = p + first * pitch;
    const float share = 1.0f / float(chunk);
    if (first == 0) {
      for (int64_t i = 0; i < chunk; ++i)
        for (int k = 0; k < kVectors; ++k)
          origin[k] += load_some(start + i * pitch + k * kLanes, lanes);
      for (int k = 0; k < kVectors; ++k) origin[k] *= share;
    }
    vf local[kVectors] = {}, local_squares[kVectors] = {};
    for (int64_t i = 0; i < chunk; ++i)
      for (int k = 0; k < kVectors; ++k)
        local[k] += load_some(start + i * pitch + k * kLanes, lanes) - origin[k];
    for (int k = 0; k < kVectors; ++k) local[k] *= share;
    for (int64_t i = 0; i < chunk; ++i)
      for (int k = 0; k < kVectors; ++k) {
        const vf d = (load_some(start + i * pitch + k * kLanes, lanes) - origin[k]) - local[k];
        local_squares[k] += d * d;
      }
    const float part = float(chunk) / float(first + chunk);
    for (int k = 0; k < kVectors; ++k) {
      const vf delta = local[k] - average[k];
      average[k] += delta * part;
      squares[k] += local_squares[k] + delta * delta * (float(first) * part);
    }
  }
  for (int k = 0; k < kVectors; ++k) {
    store_some(pivot + k * kLanes, origin[k], lanes);
    store_some(mean + k * kLanes, average[k], lanes);
    store_some(m2 + k * kLanes, squares[k], lanes);
  }
}

template <typename T, int kVectors, bool kSilu>
void apply_columns(const T* x, int64_t x_pitch, T* y, int64_t y_pitch, int64_t count, int64_t lanes,
                   const float* centre, const float* gain, const float* offset) {
  if (kVectors > 1) lanes = kLanes;
  vf m[kVectors], a[kVectors], b[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    m[k] = load_some(centre + k * kLanes, lanes);
    a[k] = load_some(gain + k * kLanes, lanes);
    b[k] = load_some(offset + k * kLanes, lanes);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int k = 0; k < kVectors; ++k) {
      const vf v = load_some(x + i * x_pitch + k * kLanes, lanes);
      store_some(y + i * y_pitch + k * kLanes, finish<T, kSilu>((v - m[k]) * a[k] + b[k]), lanes);
    }
}

template <typename T>
struct Pixels {
  const GroupNormSiluArgs& a;
  const GroupNormInput& in;
  const Plane& x;  // what is normalised in place of in.x
  bool summed;
  float* partials;  // [N, slabs, 3, C]: pivot, mean, m2
  float* maps;      // [N, 3, C]: centre, gain, offset

  explicit Pixels(const GroupNormSiluArgs& args)
      : a(args),
        in(args.in),
        x(args.sum.data ? args.sum : args.in.x),
        summed(args.sum.data != nullptr),
        partials(args.workspace),
        maps(args.workspace + 3 * in.n * in.c * group_norm_slabs(in)) {}

  float* partial(int64_t n, int64_t s) const {
    return partials + (n * group_norm_slabs(in) + s) * 3 * in.c;
  }

  template <typename F>
  void for_sources(F f) const {
    for_columns<4>(0, in.c1,
                   [&](auto vectors, int64_t c, int64_t lanes) { f(vectors, x, c, c, lanes); });
    for_columns<4>(in.c1, in.c, [&](auto vectors, int64_t c, int64_t lanes) {
      f(vectors, in.x2, c, c - in.c1, lanes);
    });
  }

  void measure(int64_t n, int64_t s) const {
    const Span span = slab_span(in, s);
    if (summed) add_pixels<T>(a, n, span);
    float* out = partial(n, s);
    for_sources([&](auto vectors, const Plane& plane, int64_t c, int64_t from, int64_t lanes) {
      column_moments<T, decltype(vectors)::kVectors>(at<T>(plane, n, from, span.first), plane.pixel,
                                                     span.count, lanes, out + c, out + in.c + c,
                                                     out + 2 * in.c + c);
    });
  }

  void combine(int64_t n) const {
    const int64_t width = in.c / in.groups;
    float* map = maps + n * 3 * in.c;
    for (int64_t g = 0; g < in.groups; ++g) {
      Moments moments;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double bias = summed ? 0.0f : channel_bias(in, n, c);
        for (int64_t s = 0; s < group_norm_slabs(in); ++s) {
          const float* p = partial(n, s) + c;
          moments.add(double(slab_span(in, s).count), double(p[0]) + double(p[in.c]) + bias,
                      double(p[2 * in.c]));
        }
      }
      double rstd;
      keep_statistics(in, n, g, moments, a.eps, &rstd);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const Affine k =
            affine(in, n, c, moments.mean, rstd, summed ? 0.0f : channel_bias(in, n, c));
        map[c] = k.centre;
        map[in.c + c] = k.gain;
        map[2 * in.c + c] = k.offset;
      }
    }
  }

  template <bool kSilu>
  void apply(int64_t n, int64_t s) const {
    const Span span = slab_span(in, s);
    const float* map = maps + n * 3 * in.c;
    for_sources([&](auto vectors, const Plane& plane, int64_t c, int64_t from, int64_t lanes) {
      apply_columns<T, decltype(vectors)::kVectors, kSilu>(
          at<T>(plane, n, from, span.first), plane.pixel, at<T>(a.y, n, c, span.first), a.y.pixel,
          span.count, lanes, map + c, map + in.c + c, map + 2 * in.c + c);
    });
  }
};

template <typename T>
void normalise(const GroupNormSiluArgs& a, int num_threads) {
  const GroupNormInput& in = a.in;
  if (in.channels_last) {
    const Pixels<T> pixels(a);
    for_slabs(
        in, num_threads, [&](int64_t n, int64_t s) { pixels.measure(n, s); },
        [&](int64_t n) { pixels.combine(n); },
        [&](int64_t n, int64_t s) {
          in.silu ? pixels.template apply<true>(n, s) : pixels.template apply<false>(n, s);
        });
    return;
  }
  for_jobs(in.n * in.groups, num_threads, runs_alone(in),
           [&](int64_t job) { rows_of_group<T>(a, job / in.groups, job % in.groups); });
}

}  // namespace
}  // namespace IDDPM_ISA
}  // namespace iddpm
