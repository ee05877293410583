// The convolution by AMX: images are copied into an operand image (doubled if asked for), weights
// are rounded and packed as pairs of channels. Sums over 2 x 2 pixels are computed afterwards.
#include "common/threads.h"
#include "conv3x3/conv3x3.h"
#include "conv3x3/taps.h"
#include "conv3x3/workspace.h"
#include "nhwc/amx_tile.h"
#include "nhwc/tile_product.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

// 16 out-channels from `first`, 32 channels from `channel` of all taps: a tile each, `stride`
// halves apart.
void pack_tiles(const Conv3x3Args& args, int64_t first, int64_t channel, int64_t stride,
                BFloat16* out) {
  alignas(64) BFloat16 rows[9][kTileEdge][kTileDepth];
  const FilterView& w = args.weight;
  const bool inside = first < args.columns;
  const int64_t channels = inside ? smaller(kTileDepth, args.channels - channel) : 0;
  if (channels < kTileDepth) std::memset(rows, 0, sizeof rows);
  if (taps_of(w) == 1) {
    for (int64_t c = 0; c < channels; c += kLanes)
      read_square(w, w.data + first * w.column + (channel + c) * w.channel,
                  [&](int64_t k, vf v) { store(rows[0][k] + c, v); });
    return transpose_pairs(rows[0][0], kTileDepth, out);
  }
  for (int64_t k = 0; k < kTileEdge && inside; ++k) {
    const float* filter = w.data + (first + k) * w.column + channel * w.channel;
    for (int64_t c = 0; c < channels; c += kLanes)
      read_taps(w, filter + c * w.channel, [&](int64_t t, vf v) { store(rows[t][k] + c, v); });
  }
  for (int64_t t = 0; t < 9; ++t, out += stride) transpose_pairs(rows[t][0], kTileDepth, out);
}

// Rows of the operand image.
void copy_images(const Conv3x3Args& args, const OperandMap& map, Range rows, BFloat16* out) {
  const OperandWriter writer(map, out, args.channels);
  const int64_t up = args.upscale == 1, height = map.height >> up, width = map.width >> up;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t sample = row / map.height, y = row % map.height;
    const BFloat16* in = static_cast<const BFloat16*>(args.in) +
                         (sample * height + (y >> up)) * width * args.in_stride;
    BFloat16* pixel = writer.row(sample, y);
    for (int64_t x = 0; x < map.width; ++x, pixel += map.pitch) {
      const BFloat16* from = in + (x >> up) * args.in_stride;
      for (int64_t c = 0; c < args.channels; c += kLanes)
        std::memcpy(pixel + c, from + c, kLanes * sizeof(BFloat16));
      if (args.channels < map.pitch)
        std::memset(pixel + args.channels, 0, kLanes * sizeof(BFloat16));
    }
    writer.finish(sample, y);
  }
}

// Sums over 2 x 2 pixels of [n, height, width, columns] -> out.
void sum_squares(const Conv3x3Args& args, const float* sums, Range rows) {
  const int64_t width = args.width / 2, step = args.columns, line = args.width * step;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    BFloat16* out = static_cast<BFloat16*>(args.out) + row * width * args.out_stride;
    const float* in = sums + 2 * row * line;
    for (int64_t x = 0; x < width; ++x, in += 2 * step, out += args.out_stride)
      for (int64_t k = 0; k < step; k += kLanes)
        store(out + k, (load(in + k) + load(in + step + k)) +
                           (load(in + line + k) + load(in + line + step + k)));
  }
}

// The map of a convolution of one tap: pixels in a row, without zeros between them.
OperandMap pointwise_map(int64_t pixels, int64_t pitch) {
  return OperandMap{1, pixels, pixels, pixels, pitch, 0, 1, pixels, pixels, 1, {}};
}

}  // namespace

int conv3x3_tiles(const Conv3x3Args& args, int num_threads) {
  const int64_t taps = taps_of(args.weight), pixels = args.height * args.width;
  // Whole tiles of one tap are read where the images lie.
  const bool in_place =
      taps == 1 && args.channels % kTileDepth == 0 && args.n * pixels % kTileEdge == 0;
  const OperandMap map =
      taps == 9
          ? convolution_map(args.height, args.width, args.channels)
          : pointwise_map(pixels, in_place ? args.in_stride : round_up(args.channels, kTileDepth));
  const int64_t chunks = divide_up(args.channels, kTileDepth);
  const int64_t panels = divide_up(args.columns, kPanel);
  const int64_t weight_halves = panels * taps * chunks * 2 * kTileHalves;
  const int64_t image_halves = in_place ? 0 : positions_of(map, args.n) * map.pitch;
  const bool summed = args.upscale < 0;
  const int64_t sum_floats = summed ? args.n * args.height * args.width * args.columns : 0;
  Workspace memory(weight_halves / 2 + Workspace::rounded(image_halves / 2) +
                   Workspace::rounded(sum_floats) + panels * kPanel);
  if (memory.failed()) return kNoMemory;
  BFloat16* weight = reinterpret_cast<BFloat16*>(memory.take(weight_halves / 2));
  BFloat16* image = reinterpret_cast<BFloat16*>(memory.take(image_halves / 2));
  if (!in_place) image += positions_before(map) * map.pitch;
  float* sums = memory.take(sum_floats);
  float* bias = memory.take(panels * kPanel);
  std::memset(bias, 0, size_t(panels * kPanel) * sizeof(float));
  if (args.bias) std::memcpy(bias, args.bias, size_t(args.columns) * sizeof(float));
  TileProductOp op{};
  op.map = &map;
  op.in = in_place ? static_cast<const BFloat16*>(args.in) : image;
  op.chunks = chunks;
  op.columns = args.columns;
  op.w = weight;
  op.bias = bias;
  op.out = sums;
  op.out_stride = summed ? args.columns : args.out_stride;
  op.out_half = summed ? nullptr : static_cast<BFloat16*>(args.out);
  for_threads(num_threads, false, [&](int64_t thread, int64_t threads) {
    const Team team{thread, threads, args.n, nullptr, 0, nullptr, 0};
    const Range tiles = share(2 * panels * chunks, 1, thread, threads);
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
      const int64_t half = i % 2, chunk = i / 2 % chunks, panel = i / 2 / chunks;
      pack_tiles(args, panel * kPanel + half * kTileEdge, chunk * kTileDepth,
                 chunks * 2 * kTileHalves,
                 weight + ((panel * taps * chunks + chunk) * 2 + half) * kTileHalves);
    }
    if (!in_place) copy_images(args, map, share(args.n * map.height, 1, thread, threads), image);
    barrier(team);
    run_tile_product(op, team);
    if (!summed) return;
    barrier(team);
    sum_squares(args, sums, share(args.n * args.height / 2, 1, thread, threads));
  });
  return kDone;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
