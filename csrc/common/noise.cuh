// Normals on the device: the four of one Philox counter (common/philox.h has the definition).
#pragma once

#include "common/cuda_compat.cuh"
#include "common/philox.h"
#include "common/plane.cuh"

namespace iddpm {

struct Normal4 {
  float z[4];
};

IDDPM_DEVICE Normal4 normal4(uint64_t seed, uint32_t quad, uint32_t sample, uint32_t step,
                             uint32_t stream_draw) {
  const Philox4 words = philox(seed, quad, sample, step, stream_draw);
  Normal4 normal;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const float radius = sqrtf(-2.0f * logf(philox_uniform(words.word[2 * pair])));
    float sine, cosine;
    sincospif(2.0f * philox_uniform(words.word[2 * pair + 1]), &sine, &cosine);
    normal.z[2 * pair] = radius * cosine;
    normal.z[2 * pair + 1] = radius * sine;
  }
  return normal;
}

// The noise of four consecutive elements: read from `given`, or drawn if the key has samples.
template <bool kDense>
IDDPM_DEVICE void noise4(const Plane& given, const NoiseKey& key, int64_t hw, int64_t sample,
                         int64_t at, int64_t end, float (&z)[4]) {
  if (key.samples == nullptr) {
    read4<float, kDense>(given, hw, sample, at, end, z);
    return;
  }
  const Normal4 normal = normal4(key.seed, uint32_t(at / 4), uint32_t(key.samples[sample]),
                                 uint32_t(key.steps[sample]), key.stream_draw);
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = normal.z[i];
}

}  // namespace iddpm
