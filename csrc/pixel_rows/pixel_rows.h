// Sums and additions over a channels_last feature map, a matrix pixels x channels
// (ops/pixel_rows.py).
#pragma once

#include "common/dtype.h"

namespace iddpm {

struct PixelRows {
  void* data;
  int64_t pitch;  // elements from pixel to pixel
};

struct ChannelSumsArgs {
  int64_t rows, c;
  DType dtype;
  PixelRows x;
  float* workspace;  // [channel_sums_chunks(rows), c]
  float* sums;       // [c]
};

// In how many parts the rows are summed: depends on their number alone, like the order.
inline int64_t channel_sums_chunks(int64_t rows) {
  constexpr int64_t kRows = 64, kMost = 264;
  const int64_t chunks = (rows + kRows - 1) / kRows;
  return chunks < kMost ? chunks : kMost;
}

int channel_sums_cuda(const ChannelSumsArgs& args, void* stream);

struct SettleArgs {
  int64_t rows, c;
  DType dtype;
  PixelRows x, residual;  // residual may have a null address
  const float* bias;      // [c], or null
};

// x += residual + bias, rounded once.
int settle_cuda(const SettleArgs& args, void* stream);

struct InterleaveArgs {
  int64_t n, height, width, c;
  DType dtype;
  const void* z;  // [n, height + 1, width + 1, 2, 2, c]
  void* y;        // [n, 2 * height, 2 * width, c]
};

// y[2i + a, 2j + b] = z[i + a, j + b, a, b].
int interleave_cuda(const InterleaveArgs& args, void* stream);

}  // namespace iddpm
