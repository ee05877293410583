// 3 x 3 convolutions with stride 1 or 2 over NHWC pixels, by im2col.
#pragma once

#include "nhwc/packing.h"
#include "nhwc/team.h"

namespace iddpm {

// A 3 x 3 convolution with padding 1, as a matrix product with gathered rows of 9 C values.
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

// How many of `pixels` (of all samples) are gathered at a time, so that they stay in the L2 cache.
static constexpr int64_t conv_block(int64_t pixels, int64_t channels) {
  const int64_t fit = 96 * 1024 / (9 * channels + kGatheredPad) / kMostTileRows;
  return smaller(larger(fit, 1) * kMostTileRows, pixels);
}

// Floats of scratch that a thread of run_conv needs.
static constexpr int64_t conv_scratch(int64_t pixels, int64_t channels) {
  return conv_block(pixels, channels) * (9 * channels + kGatheredPad);
}

namespace IDDPM_ISA {

int run_conv(const ConvOp& op, const Team& team);

}  // namespace IDDPM_ISA
}  // namespace iddpm
