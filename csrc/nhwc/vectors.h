// Vectors as wide as one register of the instruction set in use, for kernels that count registers.
//
// GCC 12 warns about its own unmasked AVX-512 intrinsics; the zero-masked forms compile to the same
// code.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace iddpm {
namespace IDDPM_ISA {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;     // floats in a register
constexpr int64_t kTileRows = 12;  // rows of a register tile: 12 x 2 accumulators of 32 registers
#else
#if defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif
constexpr int64_t kTileRows = 6;  // 6 x 2 accumulators of 16 registers
#endif
constexpr int64_t kPanel = 32;  // columns of a packed weight panel, in every instruction set

typedef float nv __attribute__((vector_size(4 * kWidth)));
typedef uint32_t words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t halves __attribute__((vector_size(2 * kWidth)));

#define IDDPM_NATIVE static inline __attribute__((always_inline))

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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

IDDPM_NATIVE halves to_halves(nv v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_maskz_cvtneps_pbh(0xFFFF, (__m512)v);
  halves h;
  std::memcpy(&h, &half, sizeof h);
  return h;
#else
  const words bits = (words)v;
  const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const words is_nan = (words)(v != v);
  return __builtin_convertvector((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded), halves);
#endif
}

IDDPM_NATIVE void nstore(uint16_t* p, nv v) {
  const halves h = to_halves(v);
  std::memcpy(p, &h, sizeof h);
}

// Two vectors side by side.
IDDPM_NATIVE void nstore(uint16_t* p, nv first, nv second) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_maskz_cvtne2ps_pbh(~0u, (__m512)second, (__m512)first);
  std::memcpy(p, &both, sizeof both);
#else
  nstore(p, first);
  nstore(p + kWidth, second);
#endif
}

// The first `count` floats at p, and zeros.
IDDPM_NATIVE nv nload_first(const float* p, int64_t count) {
  if (count >= kWidth) return nload(p);
  float some[kWidth] = {};
  if (count > 0) std::memcpy(some, p, size_t(count) * sizeof(float));
  return nload(some);
}

// Not nv{} + a, which adds a to zero before it broadcasts the sum: that is no identity for a = -0.
IDDPM_NATIVE nv nsplat(float a) {
#if defined(__AVX512F__)
  return (nv)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (nv)_mm256_set1_ps(a);
#else
  return nv{a, a, a, a};
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

// 2^x for x <= 127; what would be smaller than the least normal number is zero or close to it.
IDDPM_NATIVE nv exp2_bounded(nv x) {
#if defined(__AVX512F__)
  const nv n = (nv)_mm512_maskz_roundscale_ps(0xFFFF, (__m512)x, 8);
  return (nv)_mm512_maskz_scalef_ps(0xFFFF, (__m512)exp2_fraction(x - n), (__m512)n);
#elif defined(__AVX2__)
  x = (nv)_mm256_max_ps((__m256)x, _mm256_set1_ps(-126.0f));
  const nv n = (nv)_mm256_round_ps((__m256)x, 8);
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32((__m256)n), 23);
  return (nv)_mm256_add_epi32((__m256i)exp2_fraction(x - n), exponent);
#else
  typedef int32_t lanes __attribute__((vector_size(4 * kWidth)));
  x = x < nsplat(-126.0f) ? nsplat(-126.0f) : x;
  const nv n = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the last bit becomes the ones
  return (nv)((lanes)exp2_fraction(x - n) + (__builtin_convertvector(n, lanes) << 23));
#endif
}

#if defined(__AVX2__)
// The same with a relative error of 1e-4, for results that are rounded to bfloat16.
IDDPM_NATIVE nv exp2_coarse(nv x) {
#if defined(__AVX512F__)
  const nv f = (nv)_mm512_maskz_reduce_ps(0xFFFF, (__m512)x, 9);  // x - floor(x)
#else
  x = (nv)_mm256_max_ps((__m256)x, _mm256_set1_ps(-126.0f));
  const nv n = (nv)_mm256_round_ps((__m256)x, 9), f = x - n;
#endif
  nv p = nsplat(7.8024520e-02f);
  p = p * f + 2.2606716e-01f;
  p = p * f + 6.9583354e-01f;
  p = p * f + 9.9992522e-01f;
#if defined(__AVX512F__)
  return (nv)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)x);
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32((__m256)n), 23);
  return (nv)_mm256_add_epi32((__m256i)p, exponent);
#endif
}
#endif

// e^x for x <= 88; what would be smaller than the least normal number is zero or close to it.
IDDPM_NATIVE nv exp_bounded(nv x) {
  const float log2e = 1.44269504f;
#if defined(__AVX2__)
  const float log2e_rest = 1.92596299e-8f;
#endif
#if defined(__AVX512F__)
  const nv n = (nv)_mm512_maskz_roundscale_ps(0xFFFF, (__m512)(x * log2e), 8);
  const nv f = (x * log2e - n) + x * log2e_rest;
  return (nv)_mm512_maskz_scalef_ps(0xFFFF, (__m512)exp2_fraction(f), (__m512)n);
#elif defined(__AVX2__)
  x = (nv)_mm256_max_ps((__m256)x, _mm256_set1_ps(-87.0f));
  const nv n = (nv)_mm256_round_ps((__m256)(x * log2e), 8);
  const nv f = (x * log2e - n) + x * log2e_rest;
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32((__m256)n), 23);
  return (nv)_mm256_add_epi32((__m256i)exp2_fraction(f), exponent);
#else
  return exp2_bounded(x * log2e);
#endif
}

// The second where the first is NaN.
IDDPM_NATIVE nv nmax(nv x, nv y) {
#if defined(__AVX512F__)
  return (nv)_mm512_maskz_max_ps(0xFFFF, (__m512)x, (__m512)y);
#elif defined(__AVX2__)
  return (nv)_mm256_max_ps((__m256)x, (__m256)y);
#else
  return x > y ? x : y;
#endif
}

IDDPM_NATIVE float sum_lanes(nv v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lane[kWidth];
  nstore(lane, v);
  for (int64_t width = kWidth / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
#endif
}

IDDPM_NATIVE float max_lanes(nv v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lane[kWidth];
  nstore(lane, v);
  float most = lane[0];
  for (int64_t i = 1; i < kWidth; ++i) most = lane[i] > most ? lane[i] : most;
  return most;
#endif
}

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
