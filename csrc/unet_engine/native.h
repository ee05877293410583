// Vectors as wide as one register of the instruction set in use, for kernels that count registers.
//
// GCC 12 warns about its own unmasked AVX-512 intrinsics; the zero-masked forms compile to the same
// code.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/isa.h"

namespace iddpm {
namespace IDDPM_ISA {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;     // floats in a register
constexpr int64_t kTileRows = 12;  // rows of a register tile: 12 x 2 accumulators of 32 registers
#else
constexpr int64_t kWidth = 8;
constexpr int64_t kTileRows = 6;  // 6 x 2 accumulators of 16 registers
#endif
constexpr int64_t kPanel = 32;  // columns of a packed weight panel, in every instruction set

typedef float nv __attribute__((vector_size(4 * kWidth)));
typedef uint32_t words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t halves __attribute__((vector_size(2 * kWidth)));

#define IDDPM_NATIVE static inline __attribute__((always_inline))

IDDPM_NATIVE nv nload(const float* p) {
  nv v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

IDDPM_NATIVE void nstore(float* p, nv v) { std::memcpy(p, &v, sizeof v); }

// bfloat16, rounded to the nearest.
IDDPM_NATIVE nv nload(const uint16_t* p) {
  halves h;
  std::memcpy(&h, p, sizeof h);
  return (nv)(__builtin_convertvector(h, words) << 16);
}

IDDPM_NATIVE void nstore(uint16_t* p, nv v) {
  const words bits = (words)v;
  const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const words is_nan = (words)(v != v);
  const halves h =
      __builtin_convertvector((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded), halves);
  std::memcpy(p, &h, sizeof h);
}

// Not nv{} + a, which adds a to zero before it broadcasts the sum: that is no identity for a = -0.
IDDPM_NATIVE nv nsplat(float a) {
#if defined(__AVX512F__)
  return (nv)_mm512_set1_ps(a);
#else
  return (nv)_mm256_set1_ps(a);
#endif
}

// 2^f for f in [-1/2, 1/2], relative error 8e-8.
IDDPM_NATIVE nv exp2_fraction(nv f) {
  nv p = nsplat(1.3276471979e-3f);
  p = p * f + 9.6755413344e-3f;
  p = p * f + 5.5507132734e-2f;
  p = p * f + 2.4022119724e-1f;
  p = p * f + 6.9314696707e-1f;
  return p * f + 1.0f;
}

// e^x for x <= 88; what would be smaller than the least normal number is zero or close to it.
IDDPM_NATIVE nv exp_bounded(nv x) {
  const float log2e = 1.44269504f, log2e_rest = 1.92596299e-8f;
#if defined(__AVX512F__)
  const nv n = (nv)_mm512_maskz_roundscale_ps(0xFFFF, (__m512)(x * log2e), 8);
  const nv f = (x * log2e - n) + x * log2e_rest;
  return (nv)_mm512_maskz_scalef_ps(0xFFFF, (__m512)exp2_fraction(f), (__m512)n);
#else
  x = (nv)_mm256_max_ps((__m256)x, _mm256_set1_ps(-87.0f));
  const nv n = (nv)_mm256_round_ps((__m256)(x * log2e), 8);
  const nv f = (x * log2e - n) + x * log2e_rest;
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32((__m256)n), 23);
  return (nv)_mm256_add_epi32((__m256i)exp2_fraction(f), exponent);
#endif
}

IDDPM_NATIVE nv nmax(nv x, nv y) { return x > y ? x : y; }

// x / (1 + e^-x); NaN stays NaN.
IDDPM_NATIVE nv silu(nv x) {
  const nv bound = nsplat(87.0f), negative = -x;
  const nv d = exp_bounded(negative > bound ? bound : negative) + 1.0f;
#if defined(__AVX512F__)
  const nv r = (nv)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)d);
  return x * (r + r * (1.0f - d * r));  // one Newton step: 2^-14 to full precision
#else
  return x / d;
#endif
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
