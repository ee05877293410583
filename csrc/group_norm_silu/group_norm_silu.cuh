// The forward pass: sum, mean, squares about the mean, result; see group_norm_cuda.cuh.
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

// Reads V elements for the first time, adds and writes the sum where one is asked for.
template <typename T, int V>
IDDPM_DEVICE Pack<T, V> first_read(const ForwardWalk<T>& w, int64_t i, const float (&bias)[V]) {
  const Pack<T, V> pack = load_pack<T, V>(w.x.at(i));
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

  float total = 0.0f;
  for (int64_t k = t.team; k < width; k += t.count) {
    const float bias = bias_of(in, n, first + k);
    float biases[V];
#pragma unroll
    for (int i = 0; i < V; ++i) biases[i] = bias;
    const ForwardWalk<T> w(a, n, first + k, V);
    for (int64_t v = t.rank; v < vectors; v += t.size) {
      const Pack<T, V> pack = first_read<T, V>(w, v, biases);
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

// `slice` channels a block, a multiple of V and of the group; the last block of a sample may have
// fewer.
template <typename T, int V, bool kStaged, bool kSilu>
__global__ void __launch_bounds__(kGroupNormThreads)
    group_norm_columns_kernel(const GroupNormSiluArgs a, const int64_t slice) {
  IDDPM_SMEM(float, parts, kGroupNormThreads* V);
  IDDPM_SMEM(float, more_parts, kGroupNormThreads* V);
  IDDPM_SMEM_DYNAMIC(unsigned char, stage);
  const GroupNormInput& in = a.in;
  const int64_t slices = (in.c + slice - 1) / slice;
  const int64_t n = blockIdx.x / slices, first = (blockIdx.x - n * slices) * slice;
  const int width = static_cast<int>(in.c - first < slice ? in.c - first : slice);
  const int columns = width / V, rows = kGroupNormThreads / columns;
  const int group = static_cast<int>(in.c / in.groups);
  const int thread = static_cast<int>(threadIdx.x), row = thread / columns;
  const int local = (thread - row * columns) * V;  // the thread's first channel in the slice
  const bool active = row < rows;
  const int64_t c = first + local;
  const float count = static_cast<float>(group * in.hw);
  const Shelf<T, V, kStaged> shelf{reinterpret_cast<Pack<T, V>*>(stage)};
  const bool folded = a.sum.data == nullptr;
  const int64_t end = active ? in.hw : 0;
  const ForwardWalk<T> w(a, n, active ? c : 0, 1);

  float bias[V], first_sum[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) bias[i] = active ? bias_of(in, n, c + i) : 0.0f;
  for (int64_t p = row; p < end; p += rows) {
    const Pack<T, V> pack = first_read<T, V>(w, p, bias);
    shelf.put(p * columns + local / V, pack);
    float h[V];
    unpack<T, V>(pack, h);
#pragma unroll
    for (int i = 0; i < V; ++i) first_sum[i] += folded ? h[i] + bias[i] : h[i];
  }
  if (!folded)
#pragma unroll
    for (int i = 0; i < V; ++i) bias[i] = 0.0f;
  if (active)
#pragma unroll
    for (int i = 0; i < V; ++i) parts[row * width + local + i] = first_sum[i];
  __syncthreads();
  // The channels' sums go to the front of more_parts, the groups' means behind them.
  sum_parts(parts, more_parts, rows, width);
  __syncthreads();
  // Both fit: a slice has at most half as many channels as more_parts has floats.
  float* const means = more_parts + width;
  for (int g = thread; g < width / group; g += kGroupNormThreads) {
    float sum = 0.0f;
    for (int i = 0; i < group; ++i) sum += more_parts[g * group + i];
    means[g] = divide(sum, count);
  }
  __syncthreads();

  float mean[V], centre[V], rest[V], squares[V] = {}, rest_sum[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    mean[i] = active ? means[(local + i) / group] : 0.0f;
    const Centre k = centre_of(mean[i], bias[i]);
    centre[i] = k.centre;
    rest[i] = k.rest;
  }
  __syncthreads();
  for (int64_t p = row; p < end; p += rows) {
    float h[V];
    unpack<T, V>(shelf.get(p * columns + local / V, w.source.at(p)), h);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = (h[i] - centre[i]) + rest[i];
      rest_sum[i] += d;
      squares[i] += d * d;
    }
  }
  if (active)
#pragma unroll
    for (int i = 0; i < V; ++i) {
      parts[row * width + local + i] = rest_sum[i];
      more_parts[row * width + local + i] = squares[i];
    }
  __syncthreads();
  // Each thread reads a channel's parts before it writes the channel's total over the first of
  // them.
  sum_parts(parts, parts, rows, width);
  sum_parts(more_parts, more_parts, rows, width);
  __syncthreads();
  float group_rest = 0.0f, group_rstd = 0.0f;
  for (int g = thread; g < width / group; g += kGroupNormThreads) {
    float sum = 0.0f, square_sum = 0.0f;
    for (int i = 0; i < group; ++i) {
      sum += parts[g * group + i];
      square_sum += more_parts[g * group + i];
    }
    group_rest = divide(sum, count);
    const float variance = divide(square_sum, count) - group_rest * group_rest;
    group_rstd = rsqrtf(fmaxf(variance, 0.0f) + a.eps);
    // Later groups of this thread stand on later channels, which nobody else reads.
    parts[g * group] = group_rest;
    more_parts[g * group] = group_rstd;
  }
  __syncthreads();

  float gain[V], offset[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (!active) break;
    const int g = (local + i) / group;
    const AffineMap m =
        affine_map(in, n, c + i, mean[i], parts[g * group], more_parts[g * group], bias[i]);
    gain[i] = m.gain;
    offset[i] = m.offset;
    if (row == 0 && (local + i) % group == 0) {
      in.mean[n * in.groups + (c + i) / group] = mean[i] + parts[g * group];
      in.rstd[n * in.groups + (c + i) / group] = more_parts[g * group];
    }
  }
  for (int64_t p = row; p < end; p += rows) {
    float h[V];
    unpack<T, V>(shelf.get(p * columns + local / V, w.source.at(p)), h);
#pragma unroll
    for (int i = 0; i < V; ++i) h[i] = finish<T, kSilu>((h[i] - centre[i]) * gain[i] + offset[i]);
    store_pack<T, V>(w.y.at(p), packed<T, V>(h));
  }
}

template <typename T, int V, bool kSilu>
void launch_rows(const GroupNormSiluArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.in.n * a.in.groups)), block(kGroupNormThreads);
  const int64_t bytes = a.in.c / a.in.groups * a.in.hw * static_cast<int64_t>(sizeof(T));
  if (bytes <= kGroupNormStage && grant_shared(group_norm_rows_kernel<T, V, true, kSilu>, bytes))
    IDDPM_LAUNCH((group_norm_rows_kernel<T, V, true, kSilu>), grid, block, bytes, stream, a);
  else
    IDDPM_LAUNCH((group_norm_rows_kernel<T, V, false, kSilu>), grid, block, 0, stream, a);
}

template <typename T, int V, bool kSilu>
void launch_columns(const GroupNormSiluArgs& a, int64_t slice, int64_t staged, void* stream) {
  const int64_t slices = (a.in.c + slice - 1) / slice;
  const dim3 grid(static_cast<unsigned>(a.in.n * slices)), block(kGroupNormThreads);
  if (staged && grant_shared(group_norm_columns_kernel<T, V, true, kSilu>, staged))
    IDDPM_LAUNCH((group_norm_columns_kernel<T, V, true, kSilu>), grid, block, staged, stream, a,
                 slice);
  else
    IDDPM_LAUNCH((group_norm_columns_kernel<T, V, false, kSilu>), grid, block, 0, stream, a, slice);
}

template <typename T, bool kSilu>
void launch_forward(const GroupNormSiluArgs& a, void* stream) {
  constexpr int V = kPackSize<T>;
  const GroupNormInput& in = a.in;
  bool wide = true;
  for (const Plane* plane : {&in.x, &in.x2, &a.residual, &a.sum, &a.y})
    wide = wide && aligned(*plane, in.channels_last, V, 16);
  if (in.channels_last && wide && in.c % V == 0 && in.c1 % V == 0) {
    // 128-byte rows, or 64-byte ones where only those fit into shared memory.
    const int64_t size = static_cast<int64_t>(sizeof(T)), half = slice_width(in, V, 64 / size);
    int64_t slice = slice_width(in, V, 128 / size), staged = slice * in.hw * size;
    if (staged > kGroupNormStage && half * in.hw * size <= kGroupNormStage)
      slice = half, staged = half * in.hw * size;
    if (slice <= kGroupNormThreads * V / 2)
      return launch_columns<T, V, kSilu>(a, slice, staged <= kGroupNormStage ? staged : 0, stream);
  }
  if (!in.channels_last && wide && in.hw % V == 0) return launch_rows<T, V, kSilu>(a, stream);
  launch_rows<T, 1, kSilu>(a, stream);
}

}  // namespace iddpm
