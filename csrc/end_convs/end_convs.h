// The network's first and last 3x3 convolution, from few channels and to few, in float32 with
// features of any type (engines/cuda/kernels.py).
#pragma once

#include "common/dtype.h"

namespace iddpm {

// With more channels, the weights of a tile of columns would not fit into shared memory.
constexpr int64_t kMostImageChannels = 8;
// Channels of a slice of features in the last convolution.
constexpr int64_t kLastConvSlice = 32;

struct FirstConvArgs {
  int64_t n, height, width, c, k;
  DType dtype;          // of y
  Plane x;              // float32 [n, c, height * width]
  const float* weight;  // [c * 9, k], channels before taps
  void* y;              // [n, height, width, k]
};

int first_conv_cuda(const FirstConvArgs& args, void* stream);

struct LastConvArgs {
  int64_t n, height, width, c, k;
  DType dtype;          // of x
  const void* x;        // [n, height, width, c]
  const float* weight;  // [c, 9, k]
  const float* bias;    // [k]
  float* y;             // [n, k, height, width]
};

int last_conv_cuda(const LastConvArgs& args, void* stream);

}  // namespace iddpm
