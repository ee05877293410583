// The gradient of the weights by AMX: for each tap the product dy^T x over all pixels.
//
// Pixels form a sequence of positions as in an operand image (nhwc/operand.h), including zeros
// between rows and samples, so that a tap is a constant distance. Both operands consist of pairs of
// adjacent positions: [pairs][channels][2]. Those of dy are transposed to [channels][positions];
// those of x are stored twice, starting with even and with odd positions, for taps of even and odd
// distance. Blocks of positions are processed in order and each sum is computed by one thread, so
// that the order of the sum does not depend on the threads.
#include "common/threads.h"
#include "conv3x3/conv3x3.h"
#include "conv3x3/taps.h"
#include "conv3x3/workspace.h"
#include "nhwc/amx_tile.h"
#include "nhwc/operand.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

constexpr int64_t kBlockHalves = 512 * 1024;  // elements of a block's operands, for the L2 cache

// The pixels of a batch.
struct Images {
  const BFloat16* data;
  int64_t n, height, width, stride, up;  // up: 1 where every pixel counts for four
  int64_t gap;                           // zeros after a row, and rows of them after a sample
};

// Iterates over positions.
class Cursor {
 public:
  Cursor(const Images& images, int64_t position) : images_(images), position_(position) {
    const int64_t row = images.width + images.gap, rows = images.height + images.gap;
    const int64_t from = larger(position, 0);
    x_ = from % row;
    y_ = from / row % rows;
    sample_ = from / row / rows;
  }

  // The pixel of this position, null if it is padding; then moves on to the next position.
  const BFloat16* next() {
    const Images& i = images_;
    const bool outside = position_ < 0 || x_ == i.width || y_ == i.height || sample_ >= i.n;
    const int64_t line = sample_ * (i.height >> i.up) + (y_ >> i.up);
    const BFloat16* pixel =
        outside ? nullptr : i.data + (line * (i.width >> i.up) + (x_ >> i.up)) * i.stride;
    if (position_++ >= 0 && ++x_ == i.width + i.gap) {
      x_ = 0;
      if (++y_ == i.height + i.gap) {
        y_ = 0;
        ++sample_;
      }
    }
    return pixel;
  }

 private:
  const Images& images_;
  int64_t position_, x_, y_, sample_;
};

// The next two positions, channel by channel: `channels` pairs, a multiple of 16.
IDDPM_INLINE void write_pair(Cursor& cursor, int64_t channels, BFloat16* out) {
  const BFloat16* even = cursor.next();
  const BFloat16* odd = cursor.next();
  for (int64_t c = 0; c < channels; c += kLanes) {
    Halves<vf> half[2] = {};
    if (even) std::memcpy(&half[0], even + c, sizeof half[0]);
    if (odd) std::memcpy(&half[1], odd + c, sizeof half[1]);
    const vu pairs = __builtin_convertvector(half[0], vu) | __builtin_convertvector(half[1], vu)
                                                                << 16;
    std::memcpy(out + 2 * c, &pairs, sizeof pairs);
  }
}

// Sizes of a call.
struct Sizes {
  int64_t taps, gap;
  int64_t channels, columns;  // padded to whole pairs of tiles
  int64_t positions;          // of all samples
  int64_t block;              // positions at a time, a multiple of 32
  int64_t margin;             // positions before and after a block that taps reach, even

  explicit Sizes(const Conv3x3WeightBwdArgs& args) {
    taps = taps_of(args.dweight);
    gap = taps > 1;
    channels = round_up(args.channels, 2 * kTileEdge);
    columns = round_up(args.columns, 2 * kTileEdge);
    positions = args.n * (args.height + gap) * (args.width + gap);
    margin = gap * round_up(args.width + 2, 2);
    const int64_t fit = kBlockHalves / (2 * channels + columns) / kTileDepth;
    block = smaller(larger(fit, 2) * kTileDepth, round_up(positions, kTileDepth));
  }
  int64_t gradient_halves() const { return block * columns; }
  int64_t source_halves() const { return (block + 2 * margin) * channels; }  // one of two
  int64_t sum_floats() const { return taps * channels * columns; }
};

// dy at the next 32 positions: [columns / 16] tiles of 16 out-channels by 32 positions.
void pack_gradient(Cursor& dy, int64_t columns, int64_t padded, BFloat16* pairs, BFloat16* out) {
  for (int64_t i = 0; i < kTileEdge; ++i) write_pair(dy, columns, pairs + i * 2 * padded);
  for (int64_t k = 0; k < padded; k += kTileEdge, out += kTileHalves)
    transpose_pairs(pairs + 2 * k, 2 * padded, out);
}

// Two by two tiles of the sums [16 k][16 c] of one tap += the products over the block's positions.
void accumulate(const Sizes& sizes, const BFloat16* gradient, const BFloat16* source, bool begin,
                float* sums, int64_t below) {
  if (begin) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  } else {
    tile_load<0>(sums, 64);
    tile_load<1>(sums + 256, 64);
    tile_load<2>(sums + below, 64);
    tile_load<3>(sums + below + 256, 64);
  }
  const int64_t stride = 4 * sizes.channels;
  for (int64_t p = 0; p < sizes.block; p += kTileDepth) {
    tile_load<6>(source, stride);
    tile_load<4>(gradient, 64);
    tile_multiply<0, 4, 6>();
    tile_load<7>(source + 2 * kTileEdge, stride);
    tile_multiply<1, 4, 7>();
    tile_load<5>(gradient + kTileHalves, 64);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
    source += kTileDepth * sizes.channels;
    gradient += kTileEdge * 2 * sizes.columns;
  }
  tile_store<0>(sums, 64);
  tile_store<1>(sums + 256, 64);
  tile_store<2>(sums + below, 64);
  tile_store<3>(sums + below + 256, 64);
}

// sums [taps][K / 16][C / 16][16][16] -> dweight, for the out-channels of one tile.
void scatter(const Conv3x3WeightBwdArgs& args, const Sizes& sizes, const float* sums,
             int64_t tile) {
  const FilterView& w = args.dweight;
  const int64_t first = tile * kTileEdge, per_tap = sizes.channels * sizes.columns;
  for (int64_t k = 0; k < kTileEdge; ++k) {
    float* filter = w.data + (first + k) * w.column;
    const float* sum = sums + first * sizes.channels + k * 16;
    for (int64_t c = 0; c < args.channels; c += kLanes, sum += 256)
      if (sizes.taps == 1)
        store(filter + c, load(sum));  // of a dense gradient
      else
        write_taps(w, filter + c * w.channel, [&](int64_t t) { return load(sum + t * per_tap); });
  }
}

// 16 out-channels of dbias, row by row.
void add_bias(const Conv3x3WeightBwdArgs& args, int64_t first) {
  const BFloat16* dy = static_cast<const BFloat16*>(args.dy) + first;
  vf total = {};
  for (int64_t row = 0; row < args.n * args.height; ++row) {
    vf sum = {};
    for (int64_t x = 0; x < args.width; ++x, dy += args.dy_stride) sum += load<vf>(dy);
    total += sum;
  }
  store(args.dbias + first, total);
}

}  // namespace

int conv3x3_weight_bwd_tiles(const Conv3x3WeightBwdArgs& args, int num_threads) {
  const Sizes sizes(args);
  Workspace memory(Workspace::rounded(sizes.gradient_halves() / 2) +
                   Workspace::rounded(sizes.source_halves()) + sizes.sum_floats() +
                   num_threads * kTileEdge * sizes.columns);
  if (memory.failed()) return kNoMemory;
  BFloat16* gradient = reinterpret_cast<BFloat16*>(memory.take(sizes.gradient_halves() / 2));
  BFloat16* source = reinterpret_cast<BFloat16*>(memory.take(sizes.source_halves()));
  float* sums = memory.take(sizes.sum_floats());
  BFloat16* pairs =
      reinterpret_cast<BFloat16*>(memory.take(num_threads * kTileEdge * sizes.columns));
  const Images x{static_cast<const BFloat16*>(args.in),
                 args.n,
                 args.height,
                 args.width,
                 args.in_stride,
                 args.upscale,
                 sizes.gap};
  const Images dy{static_cast<const BFloat16*>(args.dy),
                  args.n,
                  args.height,
                  args.width,
                  args.dy_stride,
                  0,
                  sizes.gap};
  const int64_t k_tiles = sizes.columns / kTileEdge, c_tiles = sizes.channels / kTileEdge;
  const int64_t per_tap = sizes.channels * sizes.columns;
  // The channels that pad the last tile are never written.
  if (sizes.channels > args.channels) std::memset(source, 0, size_t(sizes.source_halves()) * 4);
  std::memset(pairs, 0, size_t(num_threads * kTileEdge * sizes.columns) * 4);
  for_threads(num_threads, false, [&](int64_t thread, int64_t threads) {
    const Team team{thread, threads, args.n, nullptr, 0, nullptr, 0};
    const Tiles tiles;
    BFloat16* mine = pairs + thread * kTileEdge * 2 * sizes.columns;
    for (int64_t first = 0; first < sizes.positions; first += sizes.block) {
      const Range chunks = share(sizes.block / kTileDepth, 1, thread, threads);
      Cursor gradients(dy, first + chunks.begin * kTileDepth);
      for (int64_t i = chunks.begin; i < chunks.end; ++i)
        pack_gradient(gradients, args.columns, sizes.columns, mine,
                      gradient + i * kTileDepth * sizes.columns);
      const Range half = share(sizes.block / 2 + sizes.margin, 1, thread, threads);
      for (int64_t odd = 0; odd <= sizes.gap; ++odd) {
        Cursor sources(x, first - sizes.margin + 2 * half.begin + odd);
        for (int64_t pair = half.begin; pair < half.end; ++pair)
          write_pair(sources, args.channels,
                     source + odd * sizes.source_halves() + pair * 2 * sizes.channels);
      }
      barrier(team);
      const int64_t k_pairs = k_tiles / 2, c_pairs = c_tiles / 2;
      const Range work = share(sizes.taps * k_pairs * c_pairs, 1, thread, threads);
      for (int64_t i = work.begin; i < work.end; ++i) {
        const int64_t k = i / c_pairs % k_pairs, c = i % c_pairs, tap = i / (k_pairs * c_pairs);
        // From the margin's start.
        const int64_t distance =
            sizes.gap * (sizes.margin + (tap / 3 - 1) * (args.width + 1) + tap % 3 - 1);
        const int64_t odd = distance % 2;
        const BFloat16* from = source + odd * sizes.source_halves() +
                               (distance - odd) * sizes.channels + c * 4 * kTileEdge;
        float* sum = sums + tap * per_tap + (2 * k * c_tiles + 2 * c) * 256;
        accumulate(sizes, gradient + 2 * k * kTileHalves, from, first == 0, sum, c_tiles * 256);
      }
      barrier(team);
    }
    const Range columns = share(divide_up(args.columns, kTileEdge), 1, thread, threads);
    for (int64_t tile = columns.begin; tile < columns.end; ++tile) {
      scatter(args, sizes, sums, tile);
      if (args.dbias) add_bias(args, tile * kTileEdge);
    }
  });
  return kDone;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
