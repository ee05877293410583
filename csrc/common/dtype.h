// Element types, with the codes of iddpm_ext/ops/arguments.py, and image batches of any strides.
#pragma once

#include <cstdint>

namespace iddpm {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Distinct types for 16-bit elements, for overloading.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// [N, C, HW]: an address, and the strides of sample, channel and pixel in elements.
struct Plane {
  void* data;
  int64_t sample;
  int64_t channel;
  int64_t pixel;

  // Whether the C * HW elements of a sample are contiguous in NCHW order.
  bool dense(int64_t hw) const { return pixel == 1 && channel == hw; }
};

}  // namespace iddpm
