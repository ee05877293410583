// The forward pass of rows of pixels, one channel after the other: sum, mean, squares about the
// mean, result. A block has a group of a sample; see group_norm_cuda.cuh.
#pragma once

#include "group_norm_silu/group_norm_cuda.cuh"

namespace iddpm {

// Where the pixels of one channel, or of V channels_last ones, are read and written.
template <typename T>
struct ForwardWalk {
  Walk<const T> x, residual;
  Walk<T> sum, y;
  Walk<const T> source;  // what is normalised: the written sum where there is one

  IDDPM_DEVICE ForwardWalk(const GroupNormSiluArgs& a, int64_t n, int64_t c, int stride)
      : x(walk<const T>(a.in.x, a.in.x2, a.in.c1, n, c, stride)),
        residual{nullptr, 0},
        sum{nullptr, 0},
        y(walk<T>(a.y, n, c, stride)),
        source(x) {
    if (a.sum.data == nullptr || c >= a.in.c1) return;
    residual = walk<const T>(a.residual, n, c, stride);
    sum = walk<T>(a.sum, n, c, stride);
    source = {sum.data, sum.step};
  }
};

// Adds to V elements of x and writes the sum where one is asked for.
template <typename T, int V>
IDDPM_DEVICE Pack<T, V> summed(const Pack<T, V>& pack, const ForwardWalk<T>& w, int64_t i,
                               const float (&bias)[V]) {
  if (w.sum.data == nullptr) return pack;
  float h[V];
  unpack<T, V>(pack, h);
  if (w.residual.data) {
    float residual[V];
    unpack<T, V>(load_pack<T, V>(w.residual.at(i)), residual);
#pragma unroll
    for (int k = 0; k < V; ++k) h[k] += residual[k];
  }
#pragma unroll
  for (int k = 0; k < V; ++k) h[k] += bias[k];
  const Pack<T, V> sum = packed<T, V>(h);
  store_pack<T, V>(w.sum.at(i), sum);
  return sum;
}

template <typename T, bool kSilu>
IDDPM_DEVICE float finish(float z) {
  return kSilu ? z * sigmoid_for<T>(z) : z;
}

template <typename T, int V, bool kStaged, bool kSilu>
__global__ void __launch_bounds__(kGroupNormThreads)
    group_norm_rows_kernel(const GroupNormSiluArgs a) {
  IDDPM_SMEM(float, scratch, 32);
  IDDPM_SMEM_DYNAMIC(unsigned char, stage);
  const GroupNormInput& in = a.in;
  const int64_t n = blockIdx.x / in.groups, g = blockIdx.x - n * in.groups;
  const int64_t width = in.c / in.groups, first = g * width;
  const int64_t vectors = in.hw / V;
  const float count = static_cast<float>(width * in.hw);
  const Teams t = make_teams(vectors);
  const Shelf<T, V, kStaged> shelf{reinterpret_cast<Pack<T, V>*>(stage)};
  const bool folded = a.sum.data == nullptr;

  if constexpr (shelf.kAhead) {
    for (int64_t k = t.team; k < width; k += t.count) {
      const Walk<const T> x = ForwardWalk<T>(a, n, first + k, V).x;
      for (int64_t v = t.rank; v < vectors; v += t.size) shelf.fetch(k * vectors + v, x.at(v));
    }
    copy_async_wait();
  }
  float total = 0.0f;
  for (int64_t k = t.team; k < width; k += t.count) {
    const float bias = bias_of(in, n, first + k);
    float biases[V];
#pragma unroll
    for (int i = 0; i < V; ++i) biases[i] = bias;
    const ForwardWalk<T> w(a, n, first + k, V);
    for (int64_t v = t.rank; v < vectors; v += t.size) {
      const Pack<T, V> x =
          shelf.kAhead ? shelf.get(k * vectors + v, w.x.at(v)) : load_pack<T, V>(w.x.at(v));
      const Pack<T, V> pack = summed<T, V>(x, w, v, biases);
      shelf.put(k * vectors + v, pack);
      float h[V];
      unpack<T, V>(pack, h);
#pragma unroll
      for (int i = 0; i < V; ++i) total += folded ? h[i] + bias : h[i];
    }
  }
  const float mean = divide(block_sum(total, scratch), count);

  float rest = 0.0f, squares = 0.0f;
  for (int64_t k = t.team; k < width; k += t.count) {
    const Centre centre = centre_of(mean, folded ? bias_of(in, n, first + k) : 0.0f);
    const Walk<const T> source = ForwardWalk<T>(a, n, first + k, V).source;
    for (int64_t v = t.rank; v < vectors; v += t.size) {
      float h[V];
      unpack<T, V>(shelf.get(k * vectors + v, source.at(v)), h);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float d = (h[i] - centre.centre) + centre.rest;
        rest += d;
        squares += d * d;
      }
    }
  }
  const float mean_rest = divide(block_sum(rest, scratch), count);
  const float variance = divide(block_sum(squares, scratch), count) - mean_rest * mean_rest;
  const float rstd = rsqrtf(fmaxf(variance, 0.0f) + a.eps);
  if (threadIdx.x == 0) {
    in.mean[n * in.groups + g] = mean + mean_rest;
    in.rstd[n * in.groups + g] = rstd;
  }

  for (int64_t k = t.team; k < width; k += t.count) {
    const int64_t c = first + k;
    const AffineMap m =
        affine_map(in, n, c, mean, mean_rest, rstd, folded ? bias_of(in, n, c) : 0.0f);
    const ForwardWalk<T> w(a, n, c, V);
    for (int64_t v = t.rank; v < vectors; v += t.size) {
      float h[V];
      unpack<T, V>(shelf.get(k * vectors + v, w.source.at(v)), h);
#pragma unroll
      for (int i = 0; i < V; ++i) h[i] = finish<T, kSilu>((h[i] - m.centre) * m.gain + m.offset);
      store_pack<T, V>(w.y.at(v), packed<T, V>(h));
    }
  }
}

}  // namespace iddpm
