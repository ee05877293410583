// 3 x 3 convolutions of any stride over NHWC pixels, as matrix products over gathered rows.
#pragma once

#include "nhwc/packing.h"
#include "nhwc/team.h"

namespace iddpm {

// A 3 x 3 convolution with padding 1, as a matrix product over gathered rows of 9 C values.
struct ConvOp {
  int64_t height, width;  // of the input before up-sampling
  const float* in;
  int64_t in_stride, channels, columns;
  const float* w;  // [ceil(columns / 32)][9 * C][32]
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
  int64_t stride;   // 1 or 2
  int64_t upscale;  // 0, or 1: the input is doubled by nearest neighbour
};

constexpr int64_t kGatheredPad = 16;  // not a power of two: rows would share cache sets

// Floats of scratch that a thread of run_conv needs; it uses more where there is more.
static constexpr int64_t conv_scratch(int64_t channels) {
  return kMostTileRows * (9 * channels + kGatheredPad);
}

namespace IDDPM_ISA {

int run_conv(const ConvOp& op, const Team& team);

}  // namespace IDDPM_ISA
}  // namespace iddpm
