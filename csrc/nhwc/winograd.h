// 3 x 3 convolutions with stride 1 by Winograd's F(m x m, 3 x 3) over NHWC pixels.
#pragma once

#include "common/dtype.h"
#include "nhwc/packing.h"
#include "nhwc/team.h"

namespace iddpm {

// T, the element of images: float, or BFloat16.
template <class T>
struct WinogradConv {
  int64_t height, width;  // of the convolution's output
  const T* in;
  int64_t in_stride, channels, columns;
  const float* w;  // [panels][(m + 2)^2][C][32]; of run_winograd_bf16: bfloat16, [C / 2][32][2]
  const float* bias;
  const T* residual;
  int64_t residual_stride;
  T* out;
  int64_t out_stride;
  int64_t tile;     // m: 2 or 4
  int64_t upscale;  // 0; 1: the input is doubled; -1: the output is summed over 2 x 2 pixels
  int64_t block;    // tiles that are transformed at a time
};
using WinogradOp = WinogradConv<float>;

constexpr int64_t kWinogradChannels = 4096;  // at most
constexpr int64_t kRowPad = 16;  // keeps rows of transformed tiles from sharing cache sets

struct Grid {
  int64_t rows, columns, count;  // tiles down, across, in all samples
};

static constexpr Grid grid_of(int64_t height, int64_t width, int64_t tile, int64_t n) {
  const int64_t rows = divide_up(height, tile), columns = divide_up(width, tile);
  return Grid{rows, columns, rows * columns * n};
}

// Elements of a transformed tile: products per pair of channels.
static constexpr int64_t winograd_elements(int64_t tile) { return (tile + 2) * (tile + 2); }

// Below this many tiles a thread, a team transforms all of them together and divides the panels.
static constexpr int64_t few_tiles(int64_t tile_rows) { return 2 * tile_rows; }

// How many tiles are transformed at a time, so that they stay in the second cache level, of `cache`
// bytes, beside the weights. Where those are too large for it, each block reads all of them from
// memory: then tiles may fill a level of 2 MiB or more, for fewer blocks.
static constexpr int64_t winograd_block(int64_t tile, int64_t channels, int64_t columns, bool bf16,
                                        int64_t cache) {
  const int64_t weights = winograd_elements(tile) * channels * columns * int64_t{sizeof(float)};
  const bool streamed = !bf16 && cache >= (int64_t{2} << 20) && weights > cache / 2;
  const int64_t values = streamed ? cache / int64_t{sizeof(float)} : (bf16 ? 192 : 96) * 1024;
  const int64_t per_tile = winograd_elements(tile) * (channels + kRowPad + kPanel);
  return larger(values / per_tile / kMostTileRows, 1) * kMostTileRows;
}

// Floats of scratch that run_winograd's team needs for `tiles` tiles in all.
static constexpr int64_t winograd_shared(int64_t tile, int64_t tiles, int64_t channels,
                                         int64_t threads) {
  if (threads == 1) return 0;
  return winograd_elements(tile) * smaller(tiles, few_tiles(kMostTileRows) * threads) *
         (channels + kRowPad);
}

// The same per thread.
static constexpr int64_t winograd_scratch(int64_t tile, int64_t tiles, int64_t channels,
                                          int64_t block, int64_t threads) {
  const int64_t few = threads == 1 ? 0 : smaller(tiles, few_tiles(kMostTileRows) * threads);
  const int64_t whole = smaller(block, tiles) * (channels + kRowPad + kPanel);
  return winograd_elements(tile) * larger(few * kPanel, whole);
}

// The same for run_winograd_bf16, whose products stay in L1.
static constexpr int64_t winograd_bf16_shared(int64_t tiles, int64_t channels, int64_t threads) {
  if (threads == 1) return 0;
  return divide_up(
      winograd_elements(2) * smaller(tiles, few_tiles(kMostTileRows) * threads) * channels, 2);
}

static constexpr int64_t winograd_bf16_scratch(int64_t tiles, int64_t channels, int64_t block) {
  return divide_up(winograd_elements(2) * smaller(block, tiles) * channels, 2);
}

namespace IDDPM_ISA {

int run_winograd(const WinogradOp& op, const Team& team);
int run_winograd(const WinogradConv<BFloat16>& op, const Team& team);

}  // namespace IDDPM_ISA

namespace avx512_bf16 {

// Transformed operands are rounded to bfloat16; for tile 2 only.
int run_winograd_bf16(const WinogradOp& op, const Team& team);

}  // namespace avx512_bf16
}  // namespace iddpm
