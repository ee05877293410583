// The forward pass of channels_last features; see group_norm_tile.cuh.
#pragma once

#include "group_norm_silu/group_norm_silu_rows.cuh"
#include "group_norm_silu/group_norm_tile.cuh"

namespace iddpm {

// Of a part of a group: the mean less the group's reference, and the squares about the mean. The
// reference of float32 is a number of the group, which keeps the means small: a mean of a thousand
// deviations costs no digits. 16-bit numbers are rounded more coarsely than such a mean: theirs is
// 0.
struct Moments {
  float mean, squares;
};

// What a group is normalised with; the mean is mean + rest.
struct GroupMap {
  float mean, rest, rstd;
};

// Parts of a group are combined by as many neighbouring lanes: one for each block of a cluster.
constexpr int kMomentLanes = kTileCluster;

IDDPM_DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int offset = kMomentLanes / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Those of a block's threads for one group: `across` fragments of `fragment` channels in every row,
// `pitch` from one row to the next. The lanes share the rows.
IDDPM_DEVICE Moments combine_threads(const Moments* parts, const TilePlan& plan, int pixels,
                                     int pitch, int across, int fragment, int lane) {
  const int least = pixels >> plan.sum_bits, longer = pixels - (least << plan.sum_bits);
  const float total = static_cast<float>(pixels * across * fragment);
  float sum = 0.0f;
#pragma unroll 2
  for (int row = lane; row < plan.sum_rows; row += kMomentLanes) {
    const float count = static_cast<float>((least + (row < longer)) * fragment);
#pragma unroll 1
    for (int f = 0; f < across; ++f) sum += count * parts[row * pitch + f].mean;
  }
  const float mean = pixels > 0 ? divide(lanes_sum(sum), total) : lanes_sum(sum);
  float squares = 0.0f;
#pragma unroll 2
  for (int row = lane; row < plan.sum_rows; row += kMomentLanes) {
    const float count = static_cast<float>((least + (row < longer)) * fragment);
#pragma unroll 1
    for (int f = 0; f < across; ++f) {
      const Moments part = parts[row * pitch + f];
      const float d = part.mean - mean;
      squares += part.squares + count * d * d;
    }
  }
  return {mean, lanes_sum(squares)};
}

// Those of a sample's chunks for one group of `group` channels. The lanes share the chunks.
IDDPM_DEVICE Moments combine_chunks(const Moments* parts, const GroupNormInput& in,
                                    const TilePlan& plan, int pitch, int group, int lane) {
  float means = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int i = lane; i < plan.chunks; i += kMomentLanes)
    means += static_cast<float>(TilePlace::chunk_pixels(in, plan, i)) * parts[i * pitch].mean;
  const float mean = divide(lanes_sum(means), static_cast<float>(in.hw));
#pragma unroll 1
  for (int i = lane; i < plan.chunks; i += kMomentLanes) {
    const Moments part = parts[i * pitch];
    const float d = part.mean - mean;
    squares +=
        part.squares + static_cast<float>(TilePlace::chunk_pixels(in, plan, i) * group) * d * d;
  }
  return {mean, lanes_sum(squares)};
}

// Of the pixels that a thread holds, for each of its fragments of U channels: sums of the
// differences from the fragment's first number, which is itself one of those whose squares are
// summed.
template <typename T, int V, int U>
IDDPM_DEVICE void thread_moments(const Slots<T, V>& slots, int count, const float (&bias)[V],
                                 const float (&reference)[V / U], Moments (&out)[V / U]) {
  constexpr int F = V / U;
  float start[F] = {}, sum[F] = {}, squares[F] = {}, away[V];
  if (count > 0) {
    float h[V];
    unpack<T, V>(slots[0], h);
#pragma unroll
    for (int f = 0; f < F; ++f) start[f] = h[f * U] + bias[f * U];
  }
#pragma unroll
  for (int i = 0; i < V; ++i) away[i] = bias[i] - start[i / U];
#pragma unroll 2
  for (int p = 0; p < count; ++p) {
    float h[V];
    unpack<T, V>(slots[p], h);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = h[i] + away[i];
      sum[i / U] += d;
      squares[i / U] += d * d;
    }
  }
  const float elements = static_cast<float>(count * U);
#pragma unroll
  for (int f = 0; f < F; ++f) {
    const float mean = count > 0 ? divide(sum[f], elements) : 0.0f;
    out[f] = {(start[f] - reference[f]) + mean, squares[f] - sum[f] * mean};
  }
}

// The reference of the group whose first channel is `head`: its first number.
template <typename T>
IDDPM_DEVICE float reference_of(const GroupNormInput& in, int n, int head) {
  if constexpr (sizeof(T) == 2) return 0.0f;
  return to_float(*walk<const T>(in.x, in.x2, in.c1, n, head, 0).data) + bias_of(in, n, head);
}

// From a group's moments; the first block of a sample keeps them for the backward pass.
template <typename T>
IDDPM_DEVICE GroupMap group_map(const GroupNormSiluArgs& a, const TilePlan& plan,
                                const TilePlace& at, int g, const Moments& m) {
  const GroupNormInput& in = a.in;
  const float reference = reference_of<T>(in, at.n, at.first + g * plan.group);
  const float total = static_cast<float>(plan.group) * static_cast<float>(in.hw);
  const float mean = reference + m.mean, rest = m.mean - (mean - reference);
  const float rstd = rsqrtf(fmaxf(divide(m.squares, total), 0.0f) + a.eps);
  if (at.chunk == 0) {
    const int64_t kept = at.n * in.groups + plan.by_group.quotient(at.first) + g;
    in.mean[kept] = mean;
    in.rstd[kept] = rstd;
  }
  return {mean, rest, rstd};
}

// The slots' V channels, normalised: z = (h - centre) * gain + offset.
template <typename T, int V, bool kSilu>
IDDPM_DEVICE void write_tile(const Slots<T, V>& slots, Walk<T> y, int count,
                             const float (&centre)[V], float (&gain)[V], float (&offset)[V]) {
  // The numbers of 16-bit types are rounded more coarsely than the product of centre and gain,
  // wherever their mean is. Their z sigmoid(z) is z / 2 (1 + tanh(z / 2)).
  constexpr bool kFolded = sizeof(T) == 2;
  if constexpr (kFolded) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      offset[i] -= gain[i] * centre[i];
      if (kSilu) gain[i] *= 0.5f, offset[i] *= 0.5f;
    }
  }
#pragma unroll 2
  for (int p = 0; p < count; ++p) {
    float h[V];
    unpack<T, V>(slots[p], h);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float z = (kFolded ? h[i] : h[i] - centre[i]) * gain[i] + offset[i];
      h[i] = !kSilu ? z : kFolded ? z * tanh_approx(z) + z : finish<T, true>(z);
    }
    store_pack<T, V>(y.data, packed<T, V>(h));
    y.data += y.step;
  }
}

// Reads the residual, adds and writes the sum, and leaves it in the slots.
template <typename T, int V>
IDDPM_DEVICE void add_to_slots(const Slots<T, V>& slots, int count, const float (&bias)[V],
                               const Walk<const T>& residual, const Walk<T>& sum) {
  constexpr int kAtOnce = 2;
  for (int first = 0; first < count; first += kAtOnce) {
    Pack<T, V> more[kAtOnce];
    if (residual.data)
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (first + k < count) more[k] = load_pack<T, V>(residual.at(first + k));
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k >= count) break;
      float h[V], r[V];
      unpack<T, V>(slots[first + k], h);
      if (residual.data) {
        unpack<T, V>(more[k], r);
#pragma unroll
        for (int i = 0; i < V; ++i) h[i] += r[i];
      }
#pragma unroll
      for (int i = 0; i < V; ++i) h[i] += bias[i];
      const Pack<T, V> result = packed<T, V>(h);
      slots.put(first + k, result);
      store_pack<T, V>(sum.at(first + k), result);
    }
  }
}

// 80 registers let three blocks of 256 threads share a multiprocessor; before compute capability 9
// the compiler cannot do with so few.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTileBlocks = 1;
#else
constexpr int kTileBlocks = 2;
#endif

// What the kernel and its launcher have to agree on: places in shared memory behind the slots, in
// bytes.
struct ForwardTile {
  int64_t threads;  // [rows, fragments of a row] moments
  int64_t chunks;   // [chunks, groups of the slice] moments
  int64_t groups;   // [groups of the slice] maps
  int64_t end;

  IDDPM_HD static ForwardTile of(const TilePlan& plan, int fragment) {
    const int64_t groups = plan.groups;
    ForwardTile tile{};
    tile.threads = int64_t(16) * plan.slots * plan.threads;
    tile.chunks = tile.threads + int64_t(sizeof(Moments)) * plan.sum_rows * (plan.width / fragment);
    tile.groups =
        tile.chunks + int64_t(sizeof(Moments)) * groups * (plan.cluster ? plan.chunks : 0);
    tile.end = tile.groups + int64_t(sizeof(GroupMap)) * groups;
    return tile;
  }
};

template <typename T, int U>
__global__ void __launch_bounds__(kTileThreads, U > 1 ? kTileBlocks : 1)
    group_norm_tile_kernel(const GroupNormSiluArgs a, const TilePlan plan, const TilePhase phase) {
  constexpr int V = kPackSize<T>, F = V / U;
  IDDPM_SMEM_DYNAMIC(unsigned char, shared);
  const GroupNormInput& in = a.in;
  const TilePlace at(in, plan, V);
  const int n = at.n, c = at.active ? at.channel() : 0;
  const int group = plan.group, groups = plan.groups;
  const int pitch = plan.width / U;  // fragments of a row
  const ForwardTile tile = ForwardTile::of(plan, U);
  const Slots<T, V> slots{reinterpret_cast<Pack<T, V>*>(shared) + at.thread, plan.threads};
  Moments* const of_threads = reinterpret_cast<Moments*>(shared + tile.threads);
  Moments* const of_chunks = reinterpret_cast<Moments*>(shared + tile.chunks);
  GroupMap* const of_groups = reinterpret_cast<GroupMap*>(shared + tile.groups);
  Moments* const kept = reinterpret_cast<Moments*>(a.workspace) +
                        static_cast<int64_t>(n) * plan.chunks * in.groups +
                        plan.by_group.quotient(at.first);

  const bool sums = a.sum.data != nullptr && c < in.c1,
             written = phase == TilePhase::kApply && sums;
  const Walk<const T> source = written ? tile_walk<const T>(a.sum, n, c, at, plan)
                                       : tile_walk<const T>(in.x, in.x2, in.c1, n, c, at, plan);
  slots.fetch(source, at.count);
  if (plan.cluster) cluster_arrive();

  float bias[V];
  load_biases<V>(in, n, c, plan.wide_parameters, bias);
  int of_fragment[F];  // the group in the slice
#pragma unroll
  for (int f = 0; f < F; ++f)
    of_fragment[f] = at.active ? plan.by_group.quotient(at.local + f * U) : 0;
  float reference[F];
#pragma unroll
  for (int f = 0; f < F; ++f)
    reference[f] = reference_of<T>(in, n, at.first + of_fragment[f] * group);
  copy_async_wait();

  if (sums) {
    if (phase != TilePhase::kApply)
      add_to_slots<T, V>(slots, at.count, bias, tile_walk<const T>(a.residual, n, c, at, plan),
                         tile_walk<T>(a.sum, n, c, at, plan));
#pragma unroll
    for (int i = 0; i < V; ++i) bias[i] = 0.0f;
  }

  const int lane = at.thread % kMomentLanes, team = at.thread / kMomentLanes;
  const int teams = plan.threads / kMomentLanes;
  if (phase != TilePhase::kApply) {
    const int bits = plan.sum_bits - plan.row_bits, folds = 1 << bits;
#pragma unroll 1
    for (int fold = 0; fold < folds; ++fold) {
      Moments mine[F];
      const Slots<T, V> own{slots.mine + fold * slots.step, slots.step << bits};
      thread_moments<T, V, U>(own, (at.count - fold + folds - 1) >> bits, bias, reference, mine);
      Moments* const target = of_threads + (at.row + fold * plan.rows) * pitch + at.local / U;
      if (at.active)
#pragma unroll
        for (int f = 0; f < F; ++f) target[f] = mine[f];
    }
  }
  // On their way while the threads meet.
  float gain[V], offset[V];
  load_modulation<V>(in, n, c, plan.wide_parameters, gain, offset);
  if (phase != TilePhase::kApply) {
    __syncthreads();
    if (plan.cluster) cluster_wait();
#pragma unroll 1
    for (int base = 0; base < groups; base += teams) {
      const int g = base + team;
      const bool known = g < groups;
      const Moments m = combine_threads(of_threads + (known ? g * (group / U) : 0), plan, at.pixels,
                                        pitch, group / U, U, lane);
      if (!known) continue;
      if (plan.cluster) {
        float* const target = &of_chunks[at.chunk * groups + g].mean;
        if (lane < plan.chunks) {
          cluster_store(target, lane, m.mean);
          cluster_store(target + 1, lane, m.squares);
        }
      } else if (lane == 0) {
        if (phase == TilePhase::kSums)
          kept[static_cast<int64_t>(at.chunk) * in.groups + g] = m;
        else
          of_groups[g] = group_map<T>(a, plan, at, g, m);
      }
    }
    if (phase == TilePhase::kSums) return;
    if (plan.cluster) {
      cluster_arrive();
      cluster_wait();
    }
  }
  if (plan.cluster || phase == TilePhase::kApply) {
    const Moments* const parts = plan.cluster ? of_chunks : kept;
    const int step = plan.cluster ? groups : static_cast<int>(in.groups);
#pragma unroll 1
    for (int base = 0; base < groups; base += teams) {
      const int g = base + team;
      const bool known = g < groups;
      const Moments m = combine_chunks(parts + (known ? g : 0), in, plan, step, group, lane);
      if (known && lane == 0) of_groups[g] = group_map<T>(a, plan, at, g, m);
    }
  }
  __syncthreads();

  float centre[V];
#pragma unroll
  for (int f = 0; f < F; ++f) {
    const GroupMap m = of_groups[of_fragment[f]];
#pragma unroll
    for (int i = f * U; i < (f + 1) * U; ++i) {
      const Centre k = centre_of(m.mean, bias[i]);
      gain[i] *= m.rstd;
      offset[i] += gain[i] * (k.rest - m.rest);
      centre[i] = k.centre;
    }
  }
  const Walk<T> y = tile_walk<T>(a.y, n, c, at, plan);
  if (in.silu)
    write_tile<T, V, true>(slots, y, at.count, centre, gain, offset);
  else
    write_tile<T, V, false>(slots, y, at.count, centre, gain, offset);
}

}  // namespace iddpm
