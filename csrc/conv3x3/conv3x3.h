// A 3 x 3 convolution with padding 1 and stride 1, or one of a single tap, for training, and its
// gradients, by Winograd's F(m x m, 3 x 3) in float32 over images with their channels side by side
// (iddpm_ext/ops/conv3x3/__init__.py has the equation).
//
// The kernels of csrc/nhwc compute the convolution. In training weights change at every step, so
// they are transformed here, in the same call. The gradient of the input is the convolution of dy
// with reversed taps and exchanged channels, which the strides of the weights express.
#pragma once

#include "common/amx.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace iddpm {

// weight[k, c, i, j] lies at data + k * column + c * channel + i * row + j * tap. With row and tap
// 0 the filter has one tap, which only tiles of AMX compute.
struct FilterView {
  float* data;
  int64_t column, channel, row, tap;
};

// Images are [n, height, width, stride] in `dtype`, float32 or bfloat16; the stride is the number
// of elements from pixel to pixel. C and K are multiples of 16.
struct Conv3x3Args {
  int64_t n, height, width;  // of the convolution's output
  int64_t channels, columns;
  DType dtype;
  const void* in;
  int64_t in_stride;
  FilterView weight;
  const float* bias;  // [K] or null
  void* out;
  int64_t out_stride;
  int64_t tile;     // m: 2 or 4; 0: direct convolution by AMX with rounded weights, for bfloat16
  int64_t upscale;  // 0; 1: `in` is doubled by nearest neighbour; -1: `out` is summed over 2 x 2
};

struct Conv3x3WeightBwdArgs {
  int64_t n, height, width;
  int64_t channels, columns;
  DType dtype;
  const void* in;
  int64_t in_stride;
  const void* dy;
  int64_t dy_stride;
  FilterView dweight;
  float* dbias;  // [K] or null
  int64_t tile, upscale;
};

// The status of a kernel; nothing is written unless it is kDone.
enum Conv3x3Status : int { kDone = 0, kNoInstructions = 1, kNoMemory = 2 };

}  // namespace iddpm

IDDPM_DECLARE_CPU(int, conv3x3, (const iddpm::Conv3x3Args& args, int num_threads))
IDDPM_DECLARE_CPU(int, conv3x3_weight_bwd,
                  (const iddpm::Conv3x3WeightBwdArgs& args, int num_threads))
IDDPM_DECLARE_AMX(int, conv3x3_tiles, (const iddpm::Conv3x3Args& args, int num_threads))
IDDPM_DECLARE_AMX(int, conv3x3_weight_bwd_tiles,
                  (const iddpm::Conv3x3WeightBwdArgs& args, int num_threads))
