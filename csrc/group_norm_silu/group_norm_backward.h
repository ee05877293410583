// The backward pass, for element types and instruction sets.
//
// With u = x - centre, z = u * gain + offset and y = silu(z), per channel of a sample:
//   S1 = sum dz, S2 = sum dz u, S3 = sum u   over the pixels, from which all else follows:
//   dx = gain dz - k1 - k2 u,   k1 and k2 the means over the group that make dx orthogonal to 1 and
//   x.
#pragma once

#include "group_norm_silu/group_norm_cpu.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

constexpr int64_t kRowChunk = 4096;

// float32 keeps dz in dx between the two passes; 16 bits would round it, and compute it twice.
template <typename T>
constexpr bool kKeepsDz = sizeof(T) == 4;

template <typename T, bool kSilu>
IDDPM_INLINE vf grad_before_silu(vf dy, vf z) {
  if (!kSilu) return dy;
  if (kRoundsAway<T>) return dy * silu_slope_coarse(z);
  const vf s = sigmoid(z);
  return dy * (s + z * (s * (1.0f - s)));
}

struct Sums {
  double s1 = 0, s2 = 0, s3 = 0;
};

struct Groups {
  float k1, k2;  // dx = gain * dz - k1 - k2 * (x - centre)
};

template <typename T>
struct Backward {
  const GroupNormSiluBwdArgs& a;
  const GroupNormInput& in;
  int64_t width;    // channels of a group
  float* partials;  // [N, slabs, 3, C]: S1, S2, S3 of channels_last
  float* maps;      // [N, 3, C]: centre, gain, offset
  float* totals;    // [N, 2, C]: S1, and S2 / sigma, of all pixels

  explicit Backward(const GroupNormSiluBwdArgs& args)
      : a(args),
        in(args.in),
        width(in.c / in.groups),
        partials(args.workspace),
        maps(partials + 3 * in.n * in.c * group_norm_slabs(in)),
        totals(maps + 3 * in.n * in.c) {}

  float* partial(int64_t n, int64_t s) const {
    return partials + (n * group_norm_slabs(in) + s) * 3 * in.c;
  }
  Affine map(int64_t n, int64_t c) const {
    const int64_t at = n * in.groups + c / width;
    return affine(in, n, c, in.mean[at], in.rstd[at], channel_bias(in, n, c));
  }

  // k1 and k2 of a group from the sums of its channels, and the gradients [N, C] on the way.
  template <typename F>
  Groups finish_group(int64_t n, int64_t g, F sums_of) const {
    const double rstd = in.rstd[n * in.groups + g], count = double(width * in.hw);
    double c1 = 0, c2 = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const Sums s = sums_of(c);
      const double scale = modulation(in, n, c);
      c1 += in.weight[c] * scale * s.s1;
      c2 += in.weight[c] * scale * s.s2 * rstd;
      totals[n * 2 * in.c + c] = float(s.s1);
      totals[n * 2 * in.c + in.c + c] = float(s.s2 * rstd);
      if (a.dshift) a.dshift[n * in.c + c] = float(s.s1);
      if (a.dscale) a.dscale[n * in.c + c] = float(in.weight[c] * s.s2 * rstd + in.bias[c] * s.s1);
    }
    const double k1 = rstd * c1 / count, k2 = rstd * rstd * c2 / count;
    if (a.dchannel_bias)
      for (int64_t c = g * width; c < (g + 1) * width && c < in.c1; ++c) {
        const Sums s = sums_of(c);
        // The gain unrounded, as in k1: where the group is this channel, the two cancel.
        const double gain = in.weight[c] * modulation(in, n, c) * rstd;
        const double sum = gain * s.s1 - double(in.hw) * k1 - k2 * s.s3;
        a.dchannel_bias[n * in.c1 + c] = float(sum);
      }
    return {float(k1), float(k2)};
  }

  // ---- NCHW

  template <bool kSilu>
  Sums row_sums(int64_t n, int64_t c, Affine k) const {
    const T* x = at<T>(in.x, in.x2, in.c1, n, c, 0);
    const T* dy = at<T>(a.dy, n, c, 0);
    T* dx = at<T>(a.dx, a.dx2, in.c1, n, c, 0);
    Sums total;
    for (int64_t first = 0; first < in.hw; first += kRowChunk) {
      const int64_t end = in.hw - first < kRowChunk ? in.hw : first + kRowChunk;
      vf s1 = {}, s2 = {}, s3 = {};
      for (int64_t p = first; p < end; p += kLanes) {
        const int64_t lanes = end - p < kLanes ? end - p : kLanes;
        vf u = load_some(x + p, lanes) - k.centre;
        if (lanes < kLanes) u = first_lanes(u, lanes);
        // Lanes without an element have dy = 0, and so dz = 0.
        const vf dz = grad_before_silu<T, kSilu>(load_some(dy + p, lanes), u * k.gain + k.offset);
        if (kKeepsDz<T>) store_some(dx + p, dz, lanes);
        s1 += dz;
        s2 += dz * u;
        s3 += u;
      }
      total.s1 += sum(s1);
      total.s2 += sum(s2);
      total.s3 += sum(s3);
    }
    return total;
  }

  template <bool kSilu>
  void row_grad(int64_t n, int64_t c, Affine k, Groups group) const {
    const T* x = at<T>(in.x, in.x2, in.c1, n, c, 0);
    const T* dy = at<T>(a.dy, n, c, 0);
    const T* dsum = a.dsum.data && c < in.c1 ? at<T>(a.dsum, n, c, 0) : nullptr;
    T* dx = at<T>(a.dx, a.dx2, in.c1, n, c, 0);
    for (int64_t p = 0; p < in.hw; p += kLanes) {
      const int64_t lanes = in.hw - p < kLanes ? in.hw - p : kLanes;
      const vf u = load_some(x + p, lanes) - k.centre;
      const vf dz =
          kKeepsDz<T> ? load_some(dx + p, lanes)
                      : grad_before_silu<T, kSilu>(load_some(dy + p, lanes), u * k.gain + k.offset);
      vf grad = k.gain * dz - group.k1 - group.k2 * u;
      if (dsum) grad += load_some(dsum + p, lanes);
      store_some(dx + p, grad, lanes);
    }
  }

  template <bool kSilu>
  void rows_of_group(int64_t n, int64_t g) const {
    float* kept = partial(n, 0);  // three numbers a channel
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const Sums s = row_sums<kSilu>(n, c, map(n, c));
      kept[c] = float(s.s1);
      kept[in.c + c] = float(s.s2);
      kept[2 * in.c + c] = float(s.s3);
    }
    const Groups group = finish_group(
        n, g, [&](int64_t c) { return Sums{kept[c], kept[in.c + c], kept[2 * in.c + c]}; });
    for (int64_t c = g * width; c < (g + 1) * width; ++c) row_grad<kSilu>(n, c, map(n, c), group);
  }

  // ---- channels_last

  template <typename F>
  void for_sources(F f) const {
    for_columns<2>(0, in.c1, [&](auto vectors, int64_t c, int64_t lanes) {
      f(vectors, in.x, a.dx, c, c, lanes);
    });
    for_columns<2>(in.c1, in.c, [&](auto vectors, int64_t c, int64_t lanes) {
      f(vectors, in.x2, a.dx2, c, c - in.c1, lanes);
    });
  }

  void make_maps(int64_t n) const {
    float* out = maps + n * 3 * in.c;
    for (int64_t c = 0; c < in.c; ++c) {
      const Affine k = map(n, c);
      out[c] = k.centre;
      out[in.c + c] = k.gain;
      out[2 * in.c + c] = k.offset;
    }
  }

  template <bool kSilu, int kVectors>
  void column_sums(const T* x, int64_t x_pitch, const T* dy, T* dx, int64_t dx_pitch, int64_t count,
                   int64_t lanes, const float* map, float* out) const {
    if (kVectors > 1) lanes = kLanes;
    vf m[kVectors], gain[kVectors], offset[kVectors];
    vf s1[kVectors] = {}, s2[kVectors] = {}, s3[kVectors] = {};
    for (int k = 0; k < kVectors; ++k) {
      m[k] = load_some(map + k * kLanes, lanes);
      gain[k] = load_some(map + in.c + k * kLanes, lanes);
      offset[k] = load_some(map + 2 * in.c + k * kLanes, lanes);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int k = 0; k < kVectors; ++k) {
        const vf u = load_some(x + i * x_pitch + k * kLanes, lanes) - m[k];
        const vf grad = load_some(dy + i * a.dy.pixel + k * kLanes, lanes);
        const vf dz = grad_before_silu<T, kSilu>(grad, u * gain[k] + offset[k]);
        if (kKeepsDz<T>) store_some(dx + i * dx_pitch + k * kLanes, dz, lanes);
        s1[k] += dz;
        s2[k] += dz * u;
        s3[k] += u;
      }
    for (int k = 0; k < kVectors; ++k) {
      store_some(out + k * kLanes, s1[k], lanes);
      store_some(out + in.c + k * kLanes, s2[k], lanes);
      store_some(out + 2 * in.c + k * kLanes, s3[k], lanes);
    }
  }

  template <bool kSilu, int kVectors>
  void column_grads(const T* x, int64_t x_pitch, const T* dy, const T* dsum, T* dx,
                    int64_t dx_pitch, int64_t count, int64_t lanes, const float* map,
                    const float* group) const {
    if (kVectors > 1) lanes = kLanes;
    vf m[kVectors], gain[kVectors], offset[kVectors], k1[kVectors], k2[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      m[k] = load_some(map + k * kLanes, lanes);
      gain[k] = load_some(map + in.c + k * kLanes, lanes);
      offset[k] = load_some(map + 2 * in.c + k * kLanes, lanes);
      k1[k] = load_some(group + k * kLanes, lanes);
      k2[k] = load_some(group + in.c + k * kLanes, lanes);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int k = 0; k < kVectors; ++k) {
        const int64_t at = k * kLanes;
        const vf u = load_some(x + i * x_pitch + at, lanes) - m[k];
        const vf dz = kKeepsDz<T>
                          ? load_some(dx + i * dx_pitch + at, lanes)
                          : grad_before_silu<T, kSilu>(load_some(dy + i * a.dy.pixel + at, lanes),
                                                       u * gain[k] + offset[k]);
        vf grad = gain[k] * dz - k1[k] - k2[k] * u;
        if (dsum) grad += load_some(dsum + i * a.dsum.pixel + at, lanes);
        store_some(dx + i * dx_pitch + at, grad, lanes);
      }
  }

  template <bool kSilu>
  void sum_pixels(int64_t n, int64_t s) const {
    const Span span = slab_span(in, s);
    for_sources(
        [&](auto vectors, const Plane& x, const Plane& dx, int64_t c, int64_t from, int64_t lanes) {
          column_sums<kSilu, decltype(vectors)::kVectors>(
              at<T>(x, n, from, span.first), x.pixel, at<T>(a.dy, n, c, span.first),
              at<T>(dx, n, from, span.first), dx.pixel, span.count, lanes, maps + n * 3 * in.c + c,
              partial(n, s) + c);
        });
  }

  // The first partial makes room for k1 and k2 of every channel.
  void combine(int64_t n) const {
    for (int64_t g = 0; g < in.groups; ++g) {
      const Groups group = finish_group(n, g, [&](int64_t c) {
        Sums total;
        for (int64_t s = 0; s < group_norm_slabs(in); ++s) {
          const float* p = partial(n, s) + c;
          total.s1 += p[0];
          total.s2 += p[in.c];
          total.s3 += p[2 * in.c];
        }
        return total;
      });
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        partial(n, 0)[c] = group.k1;
        partial(n, 0)[in.c + c] = group.k2;
      }
    }
  }

  template <bool kSilu>
  void pixel_grads(int64_t n, int64_t s) const {
    const Span span = slab_span(in, s);
    for_sources(
        [&](auto vectors, const Plane& x, const Plane& dx, int64_t c, int64_t from, int64_t lanes) {
          const T* dsum = a.dsum.data && c < in.c1 ? at<T>(a.dsum, n, c, span.first) : nullptr;
          column_grads<kSilu, decltype(vectors)::kVectors>(
              at<T>(x, n, from, span.first), x.pixel, at<T>(a.dy, n, c, span.first), dsum,
              at<T>(dx, n, from, span.first), dx.pixel, span.count, lanes, maps + n * 3 * in.c + c,
              partial(n, 0) + c);
        });
  }

  void reduce_batch() const {
    for (int64_t c = 0; c < in.c; ++c) {
      double dweight = 0, dbias = 0;
      for (int64_t n = 0; n < in.n; ++n) {
        const double scale = modulation(in, n, c);
        dbias += scale * totals[n * 2 * in.c + c];
        dweight += scale * totals[n * 2 * in.c + in.c + c];
      }
      a.dweight[c] = float(dweight);
      a.dbias[c] = float(dbias);
    }
  }

  template <bool kSilu>
  void run(int num_threads) const {
    if (in.channels_last) {
      for (int64_t n = 0; n < in.n; ++n) make_maps(n);
      for_slabs(
          in, num_threads, [&](int64_t n, int64_t s) { sum_pixels<kSilu>(n, s); },
          [&](int64_t n) { combine(n); }, [&](int64_t n, int64_t s) { pixel_grads<kSilu>(n, s); });
    } else {
      for_jobs(in.n * in.groups, num_threads, runs_alone(in),
               [&](int64_t job) { rows_of_group<kSilu>(job / in.groups, job % in.groups); });
    }
    reduce_batch();
  }
};

template <typename T>
void differentiate(const GroupNormSiluBwdArgs& a, int num_threads) {
  const Backward<T> backward(a);
  a.in.silu ? backward.template run<true>(num_threads) : backward.template run<false>(num_threads);
}

}  // namespace
}  // namespace IDDPM_ISA
}  // namespace iddpm
