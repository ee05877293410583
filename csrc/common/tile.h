// Tiles of 64 consecutive elements (NCHW order) of one sample, read and written through any
// strides.
//
// A tile that is contiguous float32 is used in place; others are gathered into, or scattered from,
// a buffer of the caller. So a kernel's arithmetic is written once, for contiguous float32.
#pragma once

#include "common/columns.h"
#include "common/lanes.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr int64_t kTile = 64;

// Elements that one thread takes at a time: large enough to amortise the scheduling.
constexpr int64_t kChunk = 64 * kTile;

// Below this many elements starting threads costs more than it saves.
constexpr int64_t kSerialBelow = 32768;

static const float kNanRow[kNumColumns] = {
    __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""),
    __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""),
    __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""),
    __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf("")};

// Row t of the coefficient table; a row of NaN for a step outside it.
IDDPM_INLINE const float* table_row(const float* table, int64_t t, int64_t num_timesteps) {
  const float* row = find_row(table, t, num_timesteps);
  return row ? row : kNanRow;
}

IDDPM_INLINE float read_element(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[at];
  return dtype == DType::kBFloat16 ? to_float(static_cast<const BFloat16*>(data)[at])
                                   : to_float(static_cast<const Float16*>(data)[at]);
}

// Calls f(i, offset) for the `count` elements from `first` on, with offsets by the strides.
template <typename F>
IDDPM_INLINE void walk(const Plane& plane, int64_t hw, int64_t sample, int64_t first, int64_t count,
                       F f) {
  int64_t channel = first / hw, pixel = first % hw;
  for (int64_t i = 0; i < count; ++i) {
    f(i, sample * plane.sample + channel * plane.channel + pixel * plane.pixel);
    if (++pixel == hw) pixel = 0, ++channel;
  }
}

// The tile's `count` elements; 64 are readable. `space` has room for 64 floats.
IDDPM_INLINE const float* read_tile(const Plane& plane, DType dtype, int64_t hw, int64_t sample,
                                    int64_t first, int64_t count, float* space) {
  const bool dense = plane.dense(hw) && count == kTile;
  const int64_t start = sample * plane.sample + first;
  if (dense && dtype == DType::kFloat32) return static_cast<const float*>(plane.data) + start;
  if (dense && dtype == DType::kBFloat16) {
    const BFloat16* p = static_cast<const BFloat16*>(plane.data) + start;
    for (int64_t i = 0; i < kTile; i += kLanes) store(space + i, load(p + i));
    return space;
  }
  for (int64_t i = count; i < kTile; ++i) space[i] = 0.0f;
  walk(plane, hw, sample, first, count,
       [&](int64_t i, int64_t at) { space[i] = read_element(plane.data, dtype, at); });
  return space;
}

// Where to write a float32 tile: in place, or to `space`, which write_back then scatters.
IDDPM_INLINE float* write_target(const Plane& plane, int64_t hw, int64_t sample, int64_t first,
                                 int64_t count, float* space) {
  if (plane.dense(hw) && count == kTile)
    return static_cast<float*>(plane.data) + sample * plane.sample + first;
  return space;
}

IDDPM_INLINE void write_back(const Plane& plane, int64_t hw, int64_t sample, int64_t first,
                             int64_t count, const float* written, const float* space) {
  if (written != space) return;
  walk(plane, hw, sample, first, count,
       [&](int64_t i, int64_t at) { static_cast<float*>(plane.data)[at] = space[i]; });
}

IDDPM_INLINE void write_element(void* data, DType dtype, int64_t at, float value) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(data)[at] = value;
  else if (dtype == DType::kBFloat16)
    static_cast<BFloat16*>(data)[at] = to_bfloat16(value);
  else
    static_cast<Float16*>(data)[at] = to_float16(value);
}

// Where to write the floats of a tile of any dtype: in place, or to `space`, for write_tile.
IDDPM_INLINE float* write_target(const Plane& plane, DType dtype, int64_t hw, int64_t sample,
                                 int64_t first, int64_t count, float* space) {
  if (dtype != DType::kFloat32) return space;
  return write_target(plane, hw, sample, first, count, space);
}

// Writes a tile of any dtype from 64 floats, which may be in place already.
IDDPM_INLINE void write_tile(const Plane& plane, DType dtype, int64_t hw, int64_t sample,
                             int64_t first, int64_t count, const float* values) {
  if (plane.dense(hw) && count == kTile && dtype == DType::kFloat32) {
    float* p = static_cast<float*>(plane.data) + sample * plane.sample + first;
    if (p != values) std::memcpy(p, values, kTile * sizeof(float));
    return;
  }
  walk(plane, hw, sample, first, count,
       [&](int64_t i, int64_t at) { write_element(plane.data, dtype, at, values[i]); });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
