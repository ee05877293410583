// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// normals made from it. Noise is a pure function of (seed, stream, draw, sample, step, element):
//   key = (seed low, seed high), counter = (element / 4, sample, step, stream + 16 * draw),
// and the four words give four normals by Box-Muller. `iddpm_ext/random.py` is the same in PyTorch.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace iddpm {

struct NoiseKey {
  uint64_t seed;
  uint32_t stream_draw;    // stream + 16 * draw
  const int64_t* samples;  // [N]; a null pointer means that no noise is drawn
  const int64_t* steps;    // [N]
};

struct Philox4 {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

IDDPM_HD Philox4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxMul0) * c0;
    const uint64_t p1 = uint64_t(kPhiloxMul1) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// (word + 1/2) / 2^32 in float32: never 0, at most 1.
IDDPM_HD float philox_uniform(uint32_t word) {
  return (float(word) + 0.5f) * 2.3283064365386963e-10f;
}

}  // namespace iddpm
