// Normals on the device: the four of one Philox counter (common/philox.h has the definition).
#pragma once

#include "common/cuda_compat.cuh"
#include "common/philox.h"

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

}  // namespace iddpm
