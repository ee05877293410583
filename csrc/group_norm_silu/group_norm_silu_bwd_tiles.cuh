// The backward pass of channels_last features, and the sums over the batch, in order and without
// atomics; see group_norm_tile.cuh and the formulas in group_norm_silu_bwd_rows.cuh.
#pragma once

#include "group_norm_silu/group_norm_silu_bwd_rows.cuh"
#include "group_norm_silu/group_norm_tile.cuh"

namespace iddpm {

// SiLU's derivative is (1 + t) / 2 * (1 + z / 2 (1 - t)) with t = tanh(z / 2):
// 16-bit types take z / 2 and give 2 dz, which spares two products.
template <typename T, bool kSilu>
constexpr float kHalf = kSilu && sizeof(T) == 2 ? 0.5f : 1.0f;

template <typename T, bool kSilu>
IDDPM_DEVICE float scaled_grad(float dy, float z) {
  if constexpr (kHalf<T, kSilu> == 1.0f) return grad_before_silu<T, kSilu>(dy, z);
  const float t = tanh_approx(z), a = 1.0f + t;
  return dy * (a * (z - z * t) + a);
}

// Where a channel's sums over the chunks of a split sample stand in the workspace: [N, chunks, 3,
// C].
IDDPM_DEVICE float* chunk_sums(const GroupNormSiluBwdArgs& a, const TilePlan& plan, int n,
                               int chunk) {
  return a.workspace + 2 * a.in.n * a.in.c +
         (static_cast<int64_t>(n) * plan.chunks + chunk) * 3 * a.in.c;
}

// Four rows next to each other are added first, within a warp where their lanes stand in one.
constexpr int kQuad = 4;

// What the kernel and its launcher have to agree on: places in shared memory behind the slots.
struct BackwardTile {
  bool shuffled;  // whether quads of rows are added before they reach shared memory
  int parts;      // [3, parts, width] sums of rows or of quads
  int inbox;      // [inbox, 3, width] sums of chunks
  int64_t slots;  // bytes of all the tensors

  IDDPM_HD static BackwardTile of(const TilePlan& plan, int vector, int tensors) {
    const int columns = plan.width / vector;
    const bool shuffled =
        plan.rows >= kQuad && (columns == 1 || columns == 2 || columns == 4 || columns == 8);
    return {shuffled, shuffled ? plan.rows / kQuad : plan.rows, plan.cluster ? plan.chunks : 1,
            static_cast<int64_t>(tensors) * plan.slots * plan.threads * 16};
  }
  IDDPM_HD int64_t bytes(int width) const {
    return slots + int64_t(3) * width * (parts + inbox + 1) * int64_t(sizeof(float));
  }
};

template <typename T, bool kSilu>
__global__ void __launch_bounds__(kTileThreads, 1)
    group_norm_bwd_tile_kernel(const GroupNormSiluBwdArgs a, const TilePlan plan,
                               const TilePhase phase) {
  constexpr int V = kPackSize<T>;
  IDDPM_SMEM_DYNAMIC(unsigned char, shared);
  const GroupNormInput& in = a.in;
  const TilePlace at(in, plan, V);
  const int n = at.n, c = at.active ? at.channel() : 0, width = plan.width;
  const int group = plan.group;
  const bool adds = a.dsum.data != nullptr && phase != TilePhase::kSums;
  const BackwardTile tile = BackwardTile::of(plan, V, a.dsum.data ? 3 : 2);
  const Slots<T, V> x{reinterpret_cast<Pack<T, V>*>(shared) + at.thread, plan.threads};
  const Slots<T, V> dy{x.mine + plan.slots * plan.threads, plan.threads};
  const Slots<T, V> dsum{dy.mine + plan.slots * plan.threads, plan.threads};
  float* const parts = reinterpret_cast<float*>(shared + tile.slots);
  float* const inbox = parts + 3 * width * tile.parts;
  float* const totals = inbox + 3 * width * tile.inbox;

  x.fetch(tile_walk<const T>(in.x, in.x2, in.c1, n, c, at, plan), at.count);
  dy.fetch(tile_walk<const T>(a.dy, n, c, at, plan), at.count);
  if (adds && c < in.c1) dsum.fetch(tile_walk<const T>(a.dsum, n, c, at, plan), at.count);
  if (plan.cluster) cluster_arrive();

  float gain[V], offset[V], centre[V];
  load_modulation<V>(in, n, c, plan.wide_parameters, gain, offset);
  load_biases<V>(in, n, c, plan.wide_parameters, centre);
  const int g = plan.by_group.quotient(c);
  const float* mean = in.mean + n * in.groups + g;
  const float* rstd = in.rstd + n * in.groups + g;
  float group_mean = *mean, group_rstd = *rstd;
  int rest = (g + 1) * group - c;  // channels up to the next group
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (rest-- == 0) group_mean = *++mean, group_rstd = *++rstd, rest = group - 1;
    const Centre k = centre_of(group_mean, centre[i]);
    gain[i] *= group_rstd;
    offset[i] = (offset[i] + gain[i] * k.rest) * kHalf<T, kSilu>;
    gain[i] *= kHalf<T, kSilu>;
    centre[i] = k.centre;
  }
  copy_async_wait();

  if (phase != TilePhase::kApply) {
    float s[3][V] = {};
#pragma unroll 1
    for (int p = 0; p < at.count; ++p) {
      float h[V], grad[V];
      unpack<T, V>(x[p], h);
      unpack<T, V>(dy[p], grad);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float u = h[i] - centre[i];
        const float dz = scaled_grad<T, kSilu>(grad[i], u * gain[i] + offset[i]);
        s[0][i] += dz;
        s[1][i] += dz * u;
        s[2][i] += u;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) s[0][i] *= kHalf<T, kSilu>, s[1][i] *= kHalf<T, kSilu>;
    if (tile.shuffled) {
      const int columns = width / V;
#pragma unroll
      for (int j = 0; j < 3; ++j)
#pragma unroll
        for (int i = 0; i < V; ++i) {
          s[j][i] += __shfl_xor_sync(0xffffffffu, s[j][i], columns);
          s[j][i] += __shfl_xor_sync(0xffffffffu, s[j][i], 2 * columns);
        }
    }
    if (at.active && (!tile.shuffled || at.row % kQuad == 0)) {
      const int part = tile.shuffled ? at.row / kQuad : at.row;
#pragma unroll
      for (int j = 0; j < 3; ++j)
#pragma unroll
        for (int i = 0; i < V; ++i) parts[(j * tile.parts + part) * width + at.local + i] = s[j][i];
    }
    __syncthreads();
    if (plan.cluster) cluster_wait();
    for (int k = at.thread; k < 3 * width; k += plan.threads) {
      const int j = k / width;
      const float* const column = parts + j * tile.parts * width + (k - j * width);
      float sum = 0.0f;
      if (tile.shuffled || tile.parts < kQuad)
#pragma unroll 4
        for (int i = 0; i < tile.parts; ++i) sum += column[i * width];
      else
#pragma unroll 2
        for (int i = 0; i < tile.parts; i += kQuad)
          sum += (column[i * width] + column[(i + 1) * width]) +
                 (column[(i + 2) * width] + column[(i + 3) * width]);
      if (phase == TilePhase::kSums)
        chunk_sums(a, plan, n, at.chunk)[j * in.c + at.first + (k - j * width)] = sum;
      else if (!plan.cluster)
        inbox[k] = sum;
      else
#pragma unroll 2
        for (int rank = 0; rank < plan.chunks; ++rank)
          cluster_store(inbox + at.chunk * 3 * width + k, rank, sum);
    }
    if (phase == TilePhase::kSums) return;
  } else {
    for (int k = at.thread; k < 3 * width; k += plan.threads) {
      const int j = k / width;
      const float* const column = chunk_sums(a, plan, n, 0) + j * in.c + at.first + (k - j * width);
      float sum = 0.0f;
#pragma unroll 8
      for (int i = 0; i < plan.chunks; ++i) sum += column[i * 3 * in.c];
      inbox[k] = sum;
    }
  }
  if (plan.cluster) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  // In `parts`, which all have read: the channels' shares of their group's sums, then k1 and k2.
  for (int k = at.thread; k < width; k += plan.threads) {
    float sum[3] = {};
#pragma unroll 4
    for (int i = 0; i < tile.inbox; ++i)
#pragma unroll
      for (int j = 0; j < 3; ++j) sum[j] += inbox[(i * 3 + j) * width + k];
#pragma unroll
    for (int j = 0; j < 3; ++j) totals[j * width + k] = sum[j];
    const int channel = at.first + k;
    const float rstd = in.rstd[n * in.groups + plan.by_group.quotient(channel)];
    if (at.chunk == 0) {
      float weighted[2];
      channel_grads(a, n, channel, rstd, sum[0], sum[1], weighted);
    }
    const float gamma = in.weight[channel] * factor_of(in, n, channel);
    parts[k] = gamma * sum[0];
    parts[width + k] = gamma * (sum[1] * rstd);
  }
  __syncthreads();
  for (int k = at.thread; k < width; k += plan.threads) {
    const int head = plan.by_group.quotient(k) * group, channel = at.first + k;
    float share1 = 0.0f, share2 = 0.0f;
#pragma unroll 4
    for (int i = head; i < head + group; ++i) {
      share1 += parts[i];
      share2 += parts[width + i];
    }
    const float count = static_cast<float>(group) * static_cast<float>(in.hw);
    const float rstd = in.rstd[n * in.groups + plan.by_group.quotient(channel)];
    const float k1 = rstd * divide(share1, count), k2 = rstd * rstd * divide(share2, count);
    if (at.chunk == 0)
      channel_bias_grad(a, n, channel, rstd, totals[k], totals[2 * width + k], k1, k2);
    // Where only this thread has read or will read before the barrier.
    totals[k] = k1;
    totals[width + k] = k2;
  }
  __syncthreads();

  float k1[V], k2[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    k1[i] = at.active ? totals[at.local + i] : 0.0f;
    k2[i] = at.active ? totals[width + at.local + i] : 0.0f;
  }
  const Walk<T> dx = tile_walk<T>(a.dx, a.dx2, in.c1, n, c, at, plan);
#pragma unroll 1
  for (int p = 0; p < at.count; ++p) {
    float h[V], grad[V];
    unpack<T, V>(x[p], h);
    unpack<T, V>(dy[p], grad);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float u = h[i] - centre[i];
      const float dz = scaled_grad<T, kSilu>(grad[i], u * gain[i] + offset[i]);
      grad[i] = gain[i] * dz - (k2[i] * u + k1[i]);
    }
    if (adds && c < in.c1) {
      unpack<T, V>(dsum[p], h);
#pragma unroll
      for (int i = 0; i < V; ++i) grad[i] += h[i];
    }
    store_pack<T, V>(dx.at(p), packed<T, V>(grad));
  }
}

// dweight and dbias: a lane takes every kBatchLanes-th sample of its channel, then the lanes are
// added in order.
constexpr int kBatchChannels = 32, kBatchLanes = 16;

__global__ void __launch_bounds__(kBatchChannels* kBatchLanes)
    group_norm_bwd_batch_kernel(const GroupNormSiluBwdArgs a) {
  IDDPM_SMEM(float, sums, 2 * kBatchChannels * kBatchLanes);
  const int thread = static_cast<int>(threadIdx.x), lane = thread / kBatchChannels;
  const int column = thread - lane * kBatchChannels;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kBatchChannels + column;
  const bool known = c < a.in.c;
  float dweight = 0.0f, dbias = 0.0f;
#pragma unroll 8
  for (int64_t n = lane; n < (known ? a.in.n : 0); n += kBatchLanes) {
    const float factor = factor_of(a.in, n, c);
    dbias += factor * batch_sums(a, n)[c];
    dweight += factor * batch_sums(a, n)[a.in.c + c];
  }
  sums[thread] = dbias;
  sums[thread + kBatchChannels * kBatchLanes] = dweight;
  __syncthreads();
  if (lane > 1 || !known) return;
  float* const mine = sums + lane * kBatchChannels * kBatchLanes + column;
  float sum = 0.0f;
  for (int i = 0; i < kBatchLanes; ++i) sum += mine[i * kBatchChannels];
  (lane == 0 ? a.dbias : a.dweight)[c] = sum;
}

}  // namespace iddpm
