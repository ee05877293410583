// The backward pass; the formulas are those of group_norm_silu_bwd.cpp:
//   S1 = sum dz, S2 = sum dz u, S3 = sum u   per channel of a sample, u = x - centre;
//   dx = gain dz - k1 - k2 u.
// x and dy are read again, or staged, and SiLU's derivative computed twice. A second kernel sums
// over the batch in order: no atomics.
#pragma once

#include "group_norm_silu/group_norm_tile.cuh"

namespace iddpm {

// Bytes of x, and as many of dy, in a block's tile.
constexpr int64_t kBackwardTile = 32 << 10;

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

// ---- channels_last: see group_norm_tile.cuh

// The same for a tile. SiLU's derivative is (1 + t) / 2 * (1 + z / 2 (1 - t)) with t = tanh(z / 2):
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

template <typename T, int V, bool kSilu>
void launch_bwd_rows(const GroupNormSiluBwdArgs& a, void* stream) {
  const GroupNormInput& in = a.in;
  const dim3 grid(static_cast<unsigned>(in.n * in.groups)), block(kGroupNormThreads);
  const int64_t width = in.c / in.groups, pieces = kGroupNormThreads / 32;
  const int64_t sums = ((width * pieces * 3 + 3) / 4 * 4) * static_cast<int64_t>(sizeof(float));
  const int64_t bytes = sums + 2 * width * in.hw * static_cast<int64_t>(sizeof(T));
  if (bytes <= kGroupNormStage &&
      grant_shared(group_norm_bwd_rows_kernel<T, V, true, kSilu>, bytes))
    IDDPM_LAUNCH((group_norm_bwd_rows_kernel<T, V, true, kSilu>), grid, block, bytes, stream, a);
  else if (grant_shared(group_norm_bwd_rows_kernel<T, V, false, kSilu>, sums))
    IDDPM_LAUNCH((group_norm_bwd_rows_kernel<T, V, false, kSilu>), grid, block, sums, stream, a);
}

template <typename T, bool kSilu>
bool launch_bwd_tiles(const GroupNormSiluBwdArgs& a, void* stream) {
  constexpr int V = kPackSize<T>;
  for (const Plane* plane : {&a.in.x, &a.in.x2, &a.dy, &a.dsum, &a.dx, &a.dx2})
    if (!aligned(*plane, true, V, 16)) return false;
  if (a.in.c % V || a.in.c1 % V) return false;
  const auto kernel = group_norm_bwd_tile_kernel<T, kSilu>;
  const int tensors = a.dsum.data ? 3 : 2;
  const auto shared = [&](const TilePlan& plan) {
    return BackwardTile::of(plan, V, tensors).bytes(plan.width);
  };
  const TilePlan plan =
      plan_tiles<V>(a.in, sizeof(T), tensors, kBackwardTile, false, device_limits(kernel), shared);
  if (plan.width == 0) return false;
  const int64_t bytes = shared(plan);
  if (!grant_shared(kernel, bytes - kGroupNormStatic)) return false;
  const dim3 grid(static_cast<unsigned>(tile_blocks(a.in, plan)));
  const dim3 block(static_cast<unsigned>(plan.threads));
  if (plan.split) {
    IDDPM_LAUNCH((group_norm_bwd_tile_kernel<T, kSilu>), grid, block, bytes, stream, a, plan,
                 TilePhase::kSums);
    IDDPM_LAUNCH((group_norm_bwd_tile_kernel<T, kSilu>), grid, block, bytes, stream, a, plan,
                 TilePhase::kApply);
  } else if (plan.cluster) {
    IDDPM_LAUNCH_CLUSTER((group_norm_bwd_tile_kernel<T, kSilu>), grid,
                         static_cast<unsigned>(plan.chunks), block, bytes, stream, a, plan,
                         TilePhase::kResident);
  } else {
    IDDPM_LAUNCH((group_norm_bwd_tile_kernel<T, kSilu>), grid, block, bytes, stream, a, plan,
                 TilePhase::kResident);
  }
  return true;
}

template <typename T, bool kSilu>
void launch_backward(const GroupNormSiluBwdArgs& a, void* stream) {
  constexpr int V = kPackSize<T>;
  const GroupNormInput& in = a.in;
  bool wide = !in.channels_last && in.hw % V == 0;
  for (const Plane* plane : {&in.x, &in.x2, &a.dy, &a.dsum, &a.dx, &a.dx2})
    wide = wide && aligned(*plane, false, V, 16);
  if (!in.channels_last || !launch_bwd_tiles<T, kSilu>(a, stream))
    wide ? launch_bwd_rows<T, V, kSilu>(a, stream) : launch_bwd_rows<T, 1, kSilu>(a, stream);
  const dim3 grid(static_cast<unsigned>((in.c + kBatchChannels - 1) / kBatchChannels));
  IDDPM_LAUNCH(group_norm_bwd_batch_kernel, grid, dim3(kBatchChannels * kBatchLanes), 0, stream, a);
}

}  // namespace iddpm
