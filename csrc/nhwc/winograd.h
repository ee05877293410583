// 3 x 3 convolutions with stride 1 by Winograd's F(m x m, 3 x 3) over NHWC pixels.
#pragma once

#include "common/dtype.h"
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
  int64_t upscale;  // 0; 1: the input is doubled; -1: the output is summed over squares of 2 x 2
  int64_t block;    // tiles that are transformed at a time
};
using WinogradOp = WinogradConv<float>;

namespace IDDPM_ISA {

constexpr int64_t kWinogradChannels = 4096;  // at most
constexpr int64_t kRowPad = 16;  // keeps rows of transformed tiles from sharing cache sets

struct Grid {
  int64_t rows, columns, count;  // tiles down, across, in all samples
};

static inline Grid grid_of(int64_t height, int64_t width, int64_t tile, int64_t n) {
  const int64_t rows = divide_up(height, tile), columns = divide_up(width, tile);
  return Grid{rows, columns, rows * columns * n};
}

int run_winograd(const WinogradOp& op, const Team& team);
int run_winograd(const WinogradConv<BFloat16>& op, const Team& team);

}  // namespace IDDPM_ISA

namespace avx512_bf16 {

// Transformed operands are rounded to bfloat16; of tile 2 only.
int run_winograd_bf16(const WinogradOp& op, const Team& team);

}  // namespace avx512_bf16
}  // namespace iddpm
