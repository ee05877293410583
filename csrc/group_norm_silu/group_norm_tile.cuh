// How channels_last images are cut into tiles, and what the forward and the backward kernel do with
// a tile; both walk it the same way.
//
// A block has a slice of the channels, whole groups of them and at least 96 bytes per pixel where
// there are as many, of a chunk of one sample's pixels. A thread keeps its V channels and takes
// every rows-th pixel of the chunk. The tile is copied to shared memory at once, 16 bytes a time,
// so that all of it is on its way together; a thread reads only what it copied itself. The chunks
// of a slice exchange their sums
//   in a cluster    each block writes its own into every block's shared memory, one barrier follows
//   or split        where the sample is too large for a cluster, or the device has none: a first
//                   launch writes them to the workspace, a second one reads the tile again
// and add them in the order of the chunks. Chunks, and the rows that have sums of their own, depend
// on the shape alone, so no result depends on the batch; how many such rows a thread has and how
// many channels a slice has do, and change no sum.
#pragma once

#include "group_norm_silu/group_norm_cuda.cuh"

namespace iddpm {

constexpr int kTileRows = 16, kTileThreads = 384, kTileCluster = 8;
// A thread has at least as many pixels of small images, unless a warp were to have fewer rows.
constexpr int kTilePixels = 8, kTileLeastRows = 4;
// Bytes of a pixel that a slice has at least: three sectors of 32, as groups of twelve channels
// have. Where there are few images, one sector.
constexpr int64_t kTileLine = 96, kTileNarrow = 32;
// Half a Hopper's multiprocessors: fewer blocks are too few.
constexpr int64_t kTileFewBlocks = 66;
// Times as many threads: eight warps for every multiprocessor.
constexpr int64_t kTileFewThreads = 512;

enum class TilePhase : int { kResident, kSums, kApply };

// x / by for 0 <= x < 2^31, without the twenty instructions of a division.
struct Divisor {
  uint32_t times;
  int shift;

  static Divisor of(int64_t by) {
    int shift = 0;
    while ((int64_t(1) << shift) < by) ++shift;
    const uint64_t rest = (uint64_t(1) << shift) - static_cast<uint64_t>(by);
    return {static_cast<uint32_t>((rest << 32) / static_cast<uint64_t>(by) + 1), shift};
  }
  IDDPM_DEVICE int quotient(int x) const {
    const uint32_t y = static_cast<uint32_t>(x);
    return static_cast<int>((static_cast<uint32_t>((static_cast<uint64_t>(y) * times) >> 32) + y) >>
                            shift);
  }
};

struct TilePlan {
  int width, slices;       // channels of a slice; slices of a sample
  int group, groups;       // channels of a group; groups of a slice
  int chunks, pixels;      // of a sample; pixels of a chunk, the last ones may have fewer
  int rows, row_bits;      // a power of two
  int sum_rows, sum_bits;  // rows that have sums of their own, one or two of a thread
  int threads;
  int slots;     // pixels of a thread at most
  bool cluster;  // whether the chunks of a slice are a cluster, of one block where there is one
                 // chunk
  bool split;
  Divisor by_chunks, by_slices, by_columns, by_group;  // columns: threads of a row
  bool wide_parameters;  // whether four neighbours of a row of parameters move at once
};

// What a thread of a tile kernel has to know about where it is.
struct TilePlace {
  int n, first, local;  // the slice's first channel; the thread's first one in the slice
  int chunk, row, thread;
  int begin, pixels;  // of the chunk
  bool active;
  int count;  // the thread's own pixels

  IDDPM_DEVICE TilePlace(const GroupNormInput& in, const TilePlan& plan, int vector) {
    const int unit = plan.by_chunks.quotient(static_cast<int>(blockIdx.x));
    chunk = static_cast<int>(blockIdx.x) - unit * plan.chunks;
    n = plan.by_slices.quotient(unit);
    first = (unit - n * plan.slices) * plan.width;
    thread = static_cast<int>(threadIdx.x);
    row = plan.by_columns.quotient(thread);
    local = thread * vector - row * plan.width;
    active = row < plan.rows;
    begin = chunk * plan.pixels;
    pixels = chunk_pixels(in, plan, chunk);
    count = active && row < pixels ? (pixels - row + plan.rows - 1) >> plan.row_bits : 0;
  }

  IDDPM_DEVICE static int chunk_pixels(const GroupNormInput& in, const TilePlan& plan, int chunk) {
    const int rest = static_cast<int>(in.hw) - chunk * plan.pixels;
    return rest < 0 ? 0 : rest < plan.pixels ? rest : plan.pixels;
  }
  IDDPM_DEVICE int channel() const { return first + local; }
};

// A thread's pixels of one plane: those from its first one on, `rows` pixels at a time.
template <typename T>
IDDPM_DEVICE Walk<T> tile_walk(const Plane& plane, int64_t n, int64_t c, const TilePlace& at,
                               const TilePlan& plan) {
  Walk<T> w = walk<T>(plane, n, c, plan.rows);
  if (w.data) w.data += (at.begin + at.row) * plane.pixel;
  return w;
}

template <typename T>
IDDPM_DEVICE Walk<T> tile_walk(const Plane& x, const Plane& x2, int64_t c1, int64_t n, int64_t c,
                               const TilePlace& at, const TilePlan& plan) {
  return c < c1 ? tile_walk<T>(x, n, c, at, plan) : tile_walk<T>(x2, n, c - c1, at, plan);
}

// The slots of a thread in shared memory, one pixel's V channels each.
template <typename T, int V>
struct Slots {
  Pack<T, V>* mine;
  int step;

  IDDPM_DEVICE Pack<T, V> operator[](int i) const { return load_shared(mine + i * step); }
  IDDPM_DEVICE void put(int i, const Pack<T, V>& pack) const {
    store_shared(mine + i * step, pack);
  }
  IDDPM_DEVICE void fetch(const Walk<const T>& from, int count) const {
    const T* source = from.data;
    Pack<T, V>* target = mine;
#pragma unroll 4
    for (int i = 0; i < count; ++i, source += from.step, target += step) copy_async(target, source);
  }
};

// V neighbours of a row of parameters.
template <int V>
IDDPM_DEVICE void load_channels(const float* p, bool wide, float (&out)[V]) {
  if (wide) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const Pack<float, 4> pack = load_pack<float, 4>(p + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[i + k] = pack.v[k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = p[i];
  }
}

// z = (x_hat * weight + bias) * (1 + scale) + shift = x_hat * gain + offset, for V channels from c
// on.
template <int V>
IDDPM_DEVICE void load_modulation(const GroupNormInput& in, int64_t n, int64_t c, bool wide,
                                  float (&gain)[V], float (&offset)[V]) {
  load_channels<V>(in.weight + c, wide, gain);
  load_channels<V>(in.bias + c, wide, offset);
  float more[V];
  if (in.scale) {
    load_channels<V>(in.scale + n * in.scale_stride + c, wide, more);
#pragma unroll
    for (int i = 0; i < V; ++i) gain[i] *= 1.0f + more[i], offset[i] *= 1.0f + more[i];
  }
  if (in.shift) {
    load_channels<V>(in.shift + n * in.shift_stride + c, wide, more);
#pragma unroll
    for (int i = 0; i < V; ++i) offset[i] += more[i];
  }
}

// What is added to V channels from c on, all of x or all of x2.
template <int V>
IDDPM_DEVICE void load_biases(const GroupNormInput& in, int64_t n, int64_t c, bool wide,
                              float (&bias)[V]) {
  if (in.channel_bias && c < in.c1) {
    load_channels<V>(in.channel_bias + n * in.channel_bias_stride + c, wide, bias);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) bias[i] = 0.0f;
  }
}

// ---- what the launchers decide

// What is decided here was measured and holds everywhere; the emulator tries other sizes too.
inline int64_t tile_setting([[maybe_unused]] const char* name, int64_t value) {
#if defined(__CUDACC__)
  return value;
#else
  return cuda_emu::setting(name, value);
#endif
}

inline bool four_at_once(const float* p, int64_t stride) {
  return p == nullptr || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 4 == 0);
}

// How to cut images of `bytes` bytes per element, of which a block keeps `tensors` in tiles of
// about `tile_bytes` each; of width 0 if they cannot be cut. `folds` says whether a thread can have
// two rows that have sums of their own, shared(plan) how much shared memory the kernel takes.
//
// Rows are few, and pixels many, because what a thread does but once (its place, its channels'
// parameters, its part in the sums) is as many instructions as fifteen of its pixels.
template <int V, typename Shared>
TilePlan plan_tiles(const GroupNormInput& in, int64_t bytes, int tensors, int64_t tile_bytes,
                    bool folds, const DeviceLimits& limits, Shared shared) {
  TilePlan plan{};
  const int64_t group = in.c / in.groups;
  int64_t unit = group;
  while (unit % V) unit += group;
  if (in.c % unit || unit / V > kTileThreads || in.hw > (int64_t(1) << 30)) return plan;
  const int64_t most_rows = tile_setting("ROWS", kTileRows);
  int64_t rows = 1;
  while (rows < most_rows && rows < in.hw &&
         (rows < kTileLeastRows || rows * kTilePixels < in.hw) &&
         2 * rows * (unit / V) <= kTileThreads)
    rows *= 2;
  // Sums depend on the shape alone; how many threads share them, on the batch too.
  const bool halves = folds && 2 * rows <= in.hw && 2 * rows * (unit / V) <= kTileThreads;
  const int64_t sum_rows = halves ? 2 * rows : rows;

  const int64_t line = tile_setting("LINE", kTileLine);
  const auto fits = [&](int64_t width) {
    return in.c % width == 0 && width / V * rows <= kTileThreads;
  };
  int64_t width = unit;
  for (int64_t w = unit; w <= in.c && width * bytes < line; w += unit)
    if (fits(w)) width = w;

  const auto cut = [&](int64_t w, int64_t chunks, int64_t pixels, bool split) {
    TilePlan found{};
    found.width = static_cast<int>(w);
    found.slices = static_cast<int>(in.c / w);
    found.group = static_cast<int>(group);
    found.groups = static_cast<int>(w / group);
    found.chunks = static_cast<int>(chunks);
    found.pixels = static_cast<int>(pixels);
    found.rows = static_cast<int>(rows);
    while ((1 << found.row_bits) < found.rows) ++found.row_bits;
    found.sum_rows = static_cast<int>(sum_rows);
    while ((1 << found.sum_bits) < found.sum_rows) ++found.sum_bits;
    found.threads = static_cast<int>((w / V * rows + 31) / 32 * 32);
    found.slots = static_cast<int>((pixels + rows - 1) / rows);
    found.split = split;
    found.cluster = !split && chunks > 1;
    found.by_chunks = Divisor::of(chunks);
    found.by_slices = Divisor::of(found.slices);
    found.by_columns = Divisor::of(w / V);
    found.by_group = Divisor::of(group);
    return found;
  };
  const auto has_room = [&](const TilePlan& p) { return shared(p) <= limits.shared_bytes; };

  // Chunks must not depend on the width, which may become smaller below: they are counted for a
  // line, and must have room in the widest slices.
  const int64_t pixel = (unit * bytes > 128 ? unit * bytes : 128) * tensors;
  tile_bytes = tile_setting("TILE", tile_bytes) * tensors;
  const int64_t most = limits.clusters ? tile_setting("CLUSTER", kTileCluster) : 1;
  int64_t chunks = 1;
  const auto pixels_of = [&](int64_t n) {
    return ((in.hw + n - 1) / n + sum_rows - 1) / sum_rows * sum_rows;
  };
  while (2 * chunks <= most && pixels_of(chunks) > sum_rows &&
         (pixels_of(chunks) * pixel > tile_bytes ||
          !has_room(cut(width, chunks, pixels_of(chunks), false))))
    chunks *= 2;
  plan = cut(width, chunks, pixels_of(chunks), false);
  if (!has_room(plan)) {
    // The workspace has room for one chunk in every slab.
    plan = cut(width, (in.hw + kGroupNormSlab - 1) / kGroupNormSlab, kGroupNormSlab, true);
    if (!has_room(plan)) return TilePlan{};
  }

  // Few images: more threads, and narrower slices, so that they spread over the multiprocessors.
  const int64_t blocks = tile_setting("BLOCKS", kTileFewBlocks);
  if (in.n * (in.c / V) * rows * plan.chunks < blocks * kTileFewThreads &&
      width / V * sum_rows <= kTileThreads) {
    rows = sum_rows;
    const TilePlan more = cut(width, plan.chunks, plan.pixels, plan.split);
    if (has_room(more))
      plan = more;
    else
      rows = plan.rows;
  }
  for (int64_t w = width; w >= unit; w -= unit) {
    if (!fits(w) || w * bytes < kTileNarrow || in.n * plan.slices * plan.chunks >= blocks) continue;
    const TilePlan narrower = cut(w, plan.chunks, plan.pixels, plan.split);
    if (has_room(narrower)) plan = narrower;
  }
  plan.wide_parameters = four_at_once(in.channel_bias, in.channel_bias_stride) &&
                         four_at_once(in.weight, 0) && four_at_once(in.bias, 0) &&
                         four_at_once(in.scale, in.scale_stride) &&
                         four_at_once(in.shift, in.shift_stride);
  return plan;
}

inline int64_t tile_blocks(const GroupNormInput& in, const TilePlan& plan) {
  return in.n * plan.slices * plan.chunks;
}

// Channels that a fragment of a thread's V has in one group for sure: the greatest common divisor.
inline int fragment_of(const GroupNormInput& in, int v) {
  int a = static_cast<int>(in.c / in.groups), b = v;
  while (b) {
    const int rest = a % b;
    a = b, b = rest;
  }
  return a;
}

}  // namespace iddpm
