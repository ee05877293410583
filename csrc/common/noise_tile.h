// A tile of noise, given as a tensor or drawn.
#pragma once

#include "common/philox_simd.h"
#include "common/tile.h"

namespace iddpm {
namespace IDDPM_ISA {

static_assert(kTile == kNormalsTile, "a tile of noise is a tile of the image");

// From `given` if the key draws nothing; `space` has room for 64 floats.
IDDPM_INLINE const float* noise_tile(const Plane& given, const NoiseKey& key, int64_t hw,
                                     int64_t sample, int64_t first, int64_t count, float* space) {
  if (!key.samples) return read_tile(given, DType::kFloat32, hw, sample, first, count, space);
  normals_tile(key.seed, uint32_t(first / 4), uint32_t(key.samples[sample]),
               uint32_t(key.steps[sample]), key.stream_draw, space);
  return space;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
