// The backward pass of rows of pixels; the formulas are those of group_norm_silu_bwd.cpp:
//   S1 = sum dz, S2 = sum dz u, S3 = sum u   per channel of a sample, u = x - centre;
//   dx = gain dz - k1 - k2 u.
// x and dy are read again, or staged, and SiLU's derivative computed twice.
#pragma once

#include "group_norm_silu/group_norm_cuda.cuh"

namespace iddpm {

template <typename T, bool kSilu>
IDDPM_DEVICE float grad_before_silu(float dy, float z) {
  if constexpr (!kSilu) return dy;
  const float s = sigmoid_for<T>(z);
  return dy * (s + z * (s * (1.0f - s)));
}

IDDPM_DEVICE AffineMap saved_map(const GroupNormInput& in, int64_t n, int64_t c) {
  const int64_t at = n * in.groups + c / (in.c / in.groups);
  return affine_map(in, n, c, in.mean[at], 0.0f, in.rstd[at], bias_of(in, n, c));
}

// [N, 2, C] at the front of the workspace: S1, and S2 over the deviation.
IDDPM_DEVICE float* batch_sums(const GroupNormSiluBwdArgs& a, int64_t n) {
  return a.workspace + n * 2 * a.in.c;
}

// Writes what the sums of channel c give at once; weighted[0, 1] are its shares of the group's k1,
// k2.
IDDPM_DEVICE void channel_grads(const GroupNormSiluBwdArgs& a, int64_t n, int64_t c, float rstd,
                                float s1, float s2, float (&weighted)[2]) {
  const GroupNormInput& in = a.in;
  const float unit = s2 * rstd, gamma = in.weight[c] * factor_of(in, n, c);
  batch_sums(a, n)[c] = s1;
  batch_sums(a, n)[in.c + c] = unit;
  if (a.dshift) a.dshift[n * in.c + c] = s1;
  if (a.dscale) a.dscale[n * in.c + c] = in.weight[c] * unit + in.bias[c] * s1;
  weighted[0] = gamma * s1;
  weighted[1] = gamma * unit;
}

IDDPM_DEVICE void channel_bias_grad(const GroupNormSiluBwdArgs& a, int64_t n, int64_t c, float rstd,
                                    float s1, float s3, float k1, float k2) {
  if (!a.dchannel_bias || c >= a.in.c1) return;
  const float gain = a.in.weight[c] * factor_of(a.in, n, c) * rstd;
  a.dchannel_bias[n * a.in.c1 + c] = (gain * s1 - static_cast<float>(a.in.hw) * k1) - k2 * s3;
}

// Where the pixels of one channel, or of V channels_last ones, are read and written.
template <typename T>
struct BackwardWalk {
  Walk<const T> x, dy, dsum;
  Walk<T> dx;

  IDDPM_DEVICE BackwardWalk(const GroupNormSiluBwdArgs& a, int64_t n, int64_t c, int stride)
      : x(walk<const T>(a.in.x, a.in.x2, a.in.c1, n, c, stride)),
        dy(walk<const T>(a.dy, n, c, stride)),
        dsum{nullptr, 0},
        dx(walk<T>(a.dx, a.dx2, a.in.c1, n, c, stride)) {
    if (c < a.in.c1) dsum = walk<const T>(a.dsum, n, c, stride);
  }
};

template <typename T, int V, bool kSilu>
IDDPM_DEVICE void write_grads(const BackwardWalk<T>& w, int64_t at, const Pack<T, V>& x,
                              const Pack<T, V>& dy, const float (&centre)[V],
                              const float (&gain)[V], const float (&offset)[V],
                              const float (&k1)[V], const float (&k2)[V]) {
  float h[V], grad[V];
  unpack<T, V>(x, h);
  unpack<T, V>(dy, grad);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float u = h[i] - centre[i];
    const float dz = grad_before_silu<T, kSilu>(grad[i], u * gain[i] + offset[i]);
    grad[i] = gain[i] * dz - k1[i] - k2[i] * u;
  }
  if (w.dsum.data) {
    unpack<T, V>(load_pack<T, V>(w.dsum.at(at)), h);
#pragma unroll
    for (int i = 0; i < V; ++i) grad[i] += h[i];
  }
  store_pack<T, V>(w.dx.at(at), packed<T, V>(grad));
}

// Dynamic shared memory: [width, pieces, 3] partial sums, then x and dy where they are staged.
template <typename T, int V, bool kStaged, bool kSilu>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_bwd_rows_kernel(const GroupNormSiluBwdArgs a) {
  IDDPM_SMEM(float, scratch, 32);
  IDDPM_SMEM_DYNAMIC(float, sums);
  const GroupNormInput& in = a.in;
  const int64_t n = blockIdx.x / in.groups, g = blockIdx.x - n * in.groups;
  const int width = static_cast<int>(in.c / in.groups);
  const int64_t first = g * width, vectors = in.hw / V;
  const Teams t = make_teams(vectors);
  const int pieces = t.size > 32 ? t.size / 32 : 1, span = t.size < 32 ? t.size : 32;
  const int thread = static_cast<int>(threadIdx.x);
  // 16-byte packs follow the sums, whose number is rounded up to four.
  unsigned char* const stage =
      reinterpret_cast<unsigned char*>(sums + (width * pieces * 3 + 3) / 4 * 4);
  const Shelf<T, V, kStaged> shelf_x{reinterpret_cast<Pack<T, V>*>(stage)};
  const Shelf<T, V, kStaged> shelf_dy{shelf_x.slots + width * vectors};

  if constexpr (shelf_x.kAhead) {
    for (int k = t.team; k < width; k += t.count) {
      const BackwardWalk<T> w(a, n, first + k, V);
      for (int64_t v = t.rank; v < vectors; v += t.size) {
        shelf_x.fetch(k * vectors + v, w.x.at(v));
        shelf_dy.fetch(k * vectors + v, w.dy.at(v));
      }
    }
    copy_async_wait();
  }
  for (int base = 0; base < width; base += t.count) {
    const int k = base + t.team;
    float s[3] = {};
    if (k < width) {
      const int64_t c = first + k;
      const AffineMap m = saved_map(in, n, c);
      const BackwardWalk<T> w(a, n, c, V);
#pragma unroll 2
      for (int64_t v = t.rank; v < vectors; v += t.size) {
        Pack<T, V> x, dy;
        if constexpr (shelf_x.kAhead) {
          x = shelf_x.get(k * vectors + v, nullptr);
          dy = shelf_dy.get(k * vectors + v, nullptr);
        } else {
          x = load_pack<T, V>(w.x.at(v));
          dy = load_pack<T, V>(w.dy.at(v));
          shelf_x.put(k * vectors + v, x);
          shelf_dy.put(k * vectors + v, dy);
        }
        float h[V], grad[V];
        unpack<T, V>(x, h);
        unpack<T, V>(dy, grad);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float u = h[i] - m.centre;
          const float dz = grad_before_silu<T, kSilu>(grad[i], u * m.gain + m.offset);
          s[0] += dz;
          s[1] += dz * u;
          s[2] += u;
        }
      }
    }
    // Teams smaller than a warp stay within their lanes: the offsets do not reach a neighbour.
#pragma unroll
    for (int j = 0; j < 3; ++j)
      for (int offset = span / 2; offset > 0; offset /= 2)
        s[j] += __shfl_xor_sync(0xffffffffu, s[j], offset);
    if (k < width && t.rank % 32 == 0)
#pragma unroll
      for (int j = 0; j < 3; ++j) sums[(k * pieces + t.rank / 32) * 3 + j] = s[j];
  }
  __syncthreads();

  const float rstd = in.rstd[n * in.groups + g];
  float share1 = 0.0f, share2 = 0.0f;
  for (int k = thread; k < width; k += kGroupNormThreads) {
    float* const mine = sums + k * pieces * 3;
    for (int piece = 1; piece < pieces; ++piece)
#pragma unroll
      for (int j = 0; j < 3; ++j) mine[j] += mine[piece * 3 + j];
    float weighted[2];
    channel_grads(a, n, first + k, rstd, mine[0], mine[1], weighted);
    share1 += weighted[0];
    share2 += weighted[1];
  }
  const float count = static_cast<float>(width * in.hw);
  const float k1 = rstd * divide(block_sum(share1, scratch), count);
  const float k2 = rstd * rstd * divide(block_sum(share2, scratch), count);
  for (int k = thread; k < width; k += kGroupNormThreads)
    channel_bias_grad(a, n, first + k, rstd, sums[k * pieces * 3], sums[k * pieces * 3 + 2], k1,
                      k2);

  for (int64_t k = t.team; k < width; k += t.count) {
    const int64_t c = first + k;
    const AffineMap m = saved_map(in, n, c);
    float centre[V], gain[V], offset[V], k1s[V], k2s[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      centre[i] = m.centre;
      gain[i] = m.gain;
      offset[i] = m.offset;
      k1s[i] = k1;
      k2s[i] = k2;
    }
    const BackwardWalk<T> w(a, n, c, V);
#pragma unroll 2
    for (int64_t v = t.rank; v < vectors; v += t.size)
      write_grads<T, V, kSilu>(w, v, shelf_x.get(k * vectors + v, w.x.at(v)),
                               shelf_dy.get(k * vectors + v, w.dy.at(v)), centre, gain, offset, k1s,
                               k2s);
  }
}

}  // namespace iddpm
