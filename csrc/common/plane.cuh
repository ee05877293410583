// Reads and writes four consecutive elements (NCHW order) of a sample by one thread.
//
// kDense: the plane is contiguous and aligned (`moves_in_vectors`), so that the four are one
// access; otherwise each is addressed by the strides, and those from `end` on are skipped.
#pragma once

#include "common/cuda_compat.cuh"
#include "common/dtype.h"

namespace iddpm {

// Iterates over consecutive elements of a sample from `at` on; `channel` exceeds C in the variance
// half. One division suffices for them all, in every plane. Channels and pixels of one sample fit
// into 32 bits, which saves registers; offsets do not.
class Walk {
 public:
  IDDPM_DEVICE Walk(const Plane& plane, int64_t hw, int64_t sample, int64_t at)
      : plane_(plane),
        base_(sample * plane.sample),
        hw_(static_cast<int>(hw)),
        channel_(static_cast<int>(at / hw)),
        pixel_(static_cast<int>(at - at / hw * hw)) {}
  IDDPM_DEVICE int64_t offset() const {
    return base_ + int64_t(channel_) * plane_.channel + int64_t(pixel_) * plane_.pixel;
  }
  IDDPM_DEVICE void next() {
    if (++pixel_ == hw_) pixel_ = 0, ++channel_;
  }

 private:
  const Plane& plane_;
  const int64_t base_;
  const int hw_;
  int channel_, pixel_;
};

template <typename T, bool kDense>
IDDPM_DEVICE void read4(const Plane& plane, int64_t hw, int64_t sample, int64_t at, int64_t end,
                        float (&values)[4]) {
  const T* data = static_cast<const T*>(plane.data);
  if constexpr (kDense) {
    load_floats<T, 4>(data + sample * plane.sample + at, values);
  } else {
    Walk walk(plane, hw, sample, at);
#pragma unroll
    for (int i = 0; i < 4; ++i, walk.next())
      values[i] = at + i < end ? to_float(data[walk.offset()]) : 0.0f;
  }
}

template <bool kDense, typename T = float>
IDDPM_DEVICE void write4(const Plane& plane, int64_t hw, int64_t sample, int64_t at, int64_t end,
                         const float (&values)[4]) {
  T* data = static_cast<T*>(plane.data);
  if constexpr (kDense) {
    store_floats<T, 4>(data + sample * plane.sample + at, values);
  } else {
    Walk walk(plane, hw, sample, at);
#pragma unroll
    for (int i = 0; i < 4; ++i, walk.next())
      if (at + i < end) data[walk.offset()] = from_float<T>(values[i]);
  }
}

// Whether four consecutive elements of a sample can move as one vector of `bytes` bytes.
inline bool moves_in_vectors(const Plane& plane, int64_t hw, int64_t bytes) {
  return plane.data == nullptr || (plane.dense(hw) && plane.sample % 4 == 0 &&
                                   reinterpret_cast<uintptr_t>(plane.data) % bytes == 0);
}

}  // namespace iddpm
