// Four consecutive elements (NCHW order) of a sample, as one thread reads and writes them.
//
// kDense: the plane lies in NCHW order, aligned (`moves_in_vectors`), so that the four move at
// once; otherwise each is addressed through the strides, and those from `end` on are left alone.
#pragma once

#include "common/cuda_compat.cuh"
#include "common/dtype.h"

namespace iddpm {

// Element `at` (NCHW order) of a sample; `channel` counts past C for the variance head.
IDDPM_DEVICE int64_t plane_offset(const Plane& plane, int64_t hw, int64_t sample, int64_t at) {
  const int64_t channel = at / hw;
  return sample * plane.sample + channel * plane.channel + (at - channel * hw) * plane.pixel;
}

template <typename T, bool kDense>
IDDPM_DEVICE void read4(const Plane& plane, int64_t hw, int64_t sample, int64_t at, int64_t end,
                        float (&values)[4]) {
  const T* data = static_cast<const T*>(plane.data);
  if constexpr (kDense) {
    load_floats<T, 4>(data + sample * plane.sample + at, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      values[i] = at + i < end ? to_float(data[plane_offset(plane, hw, sample, at + i)]) : 0.0f;
  }
}

template <bool kDense, typename T = float>
IDDPM_DEVICE void write4(const Plane& plane, int64_t hw, int64_t sample, int64_t at, int64_t end,
                         const float (&values)[4]) {
  T* data = static_cast<T*>(plane.data);
  if constexpr (kDense) {
    store_floats<T, 4>(data + sample * plane.sample + at, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < end) data[plane_offset(plane, hw, sample, at + i)] = from_float<T>(values[i]);
  }
}

// Whether four consecutive elements of a sample can move as one vector of `bytes` bytes.
inline bool moves_in_vectors(const Plane& plane, int64_t hw, int64_t bytes) {
  return plane.data == nullptr || (plane.dense(hw) && plane.sample % 4 == 0 &&
                                   reinterpret_cast<uintptr_t>(plane.data) % bytes == 0);
}

}  // namespace iddpm
