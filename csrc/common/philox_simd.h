// Sixteen Philox counters at once, and the 64 normals they give in element order.
#pragma once

#include "common/philox.h"
#include "common/simd_math.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr int64_t kNormalsTile = 64;  // one counter a lane, four normals a counter

// The high and low words of a[i] * m. Compilers do not find the widening multiply by themselves.
IDDPM_INLINE void multiply_wide(vu a, uint32_t m, vu* high, vu* low) {
#if defined(__AVX512F__)
  const __m512i va = (__m512i)a, vm = _mm512_set1_epi32(int(m));
  const __m512i even = _mm512_mul_epu32(va, vm);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(va, 32), vm);
  *high = (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  *low = (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  __m256i part[2], up[2], down[2];
  std::memcpy(part, &a, sizeof part);
  const __m256i vm = _mm256_set1_epi32(int(m));
  for (int i = 0; i < 2; ++i) {
    const __m256i even = _mm256_mul_epu32(part[i], vm);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(part[i], 32), vm);
    up[i] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    down[i] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  std::memcpy(high, up, sizeof up);
  std::memcpy(low, down, sizeof down);
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t p = uint64_t(a[i]) * m;
    (*high)[i] = uint32_t(p >> 32);
    (*low)[i] = uint32_t(p);
  }
#endif
}

// z[0..63]: the normals of elements 4*quad .. 4*quad + 63 of one (sample, step).
IDDPM_INLINE void normals_tile(uint64_t seed, uint32_t quad, uint32_t sample, uint32_t step,
                               uint32_t stream_draw, float* z) {
  const vu lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vu c0 = lane + quad, c1 = vu{} + sample, c2 = vu{} + step, c3 = vu{} + stream_draw;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c0, kPhiloxMul0, &high0, &low0);
    multiply_wide(c2, kPhiloxMul1, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  const float unit = 2.3283064365386963e-10f;
  vf s, c;
  const vf radius0 = sqrt(-2.0f * log((__builtin_convertvector(c0, vf) + 0.5f) * unit));
  sincos_turn((__builtin_convertvector(c1, vf) + 0.5f) * unit, &s, &c);
  const vf z0 = radius0 * c, z1 = radius0 * s;
  const vf radius1 = sqrt(-2.0f * log((__builtin_convertvector(c2, vf) + 0.5f) * unit));
  sincos_turn((__builtin_convertvector(c3, vf) + 0.5f) * unit, &s, &c);
  const vf z2 = radius1 * c, z3 = radius1 * s;

  // Lane j of z_k is element 4j + k: a 4 x 16 transposition in two interleaving stages.
#define IDDPM_PAIRS(a, b, first)                                                                  \
  IDDPM_SHUFFLE(a, b, first, first + 16, first + 1, first + 17, first + 2, first + 18, first + 3, \
                first + 19, first + 4, first + 20, first + 5, first + 21, first + 6, first + 22,  \
                first + 7, first + 23)
#define IDDPM_QUADS(a, b, first)                                                                  \
  IDDPM_SHUFFLE(a, b, first, first + 1, first + 16, first + 17, first + 2, first + 3, first + 18, \
                first + 19, first + 4, first + 5, first + 20, first + 21, first + 6, first + 7,   \
                first + 22, first + 23)
  const vf ab0 = IDDPM_PAIRS(z0, z1, 0), ab1 = IDDPM_PAIRS(z0, z1, 8);
  const vf cd0 = IDDPM_PAIRS(z2, z3, 0), cd1 = IDDPM_PAIRS(z2, z3, 8);
  store(z, IDDPM_QUADS(ab0, cd0, 0));
  store(z + 16, IDDPM_QUADS(ab0, cd0, 8));
  store(z + 32, IDDPM_QUADS(ab1, cd1, 0));
  store(z + 48, IDDPM_QUADS(ab1, cd1, 8));
#undef IDDPM_QUADS
#undef IDDPM_PAIRS
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
