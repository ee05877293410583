// Loads and stores float32, bfloat16 and float16 elements as float lanes, whole vectors and parts.
#pragma once

#include "common/dtype.h"
#include "common/simd.h"

namespace iddpm {
namespace IDDPM_ISA {

IDDPM_INLINE float to_float(BFloat16 h) {
  const uint32_t bits = uint32_t(h.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Rounded to the nearest, ties to even.
IDDPM_INLINE BFloat16 to_bfloat16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};  // quiet NaN
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// IEEE half precision without F16C, including subnormals, infinities and NaN. No intermediate float
// is subnormal, so the result does not depend on flush-to-zero.
IDDPM_INLINE float to_float(Float16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  uint32_t bits = uint32_t(h.bits & 0x7fffu) << 13;
  if (bits >= 0x0f800000u) {  // infinity, NaN
    bits += 0x70000000u;
  } else if (bits >= 0x00800000u) {
    bits += 0x38000000u;
  } else {  // the mantissa of a number in [2^-14, 2^-13), less 2^-14
    const uint32_t unit = 0x38800000u;
    float f, least;
    bits |= unit;
    std::memcpy(&f, &bits, sizeof f);
    std::memcpy(&least, &unit, sizeof least);
    f -= least;
    std::memcpy(&bits, &f, sizeof bits);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

IDDPM_INLINE Float16 to_float16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets the hardware round
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {uint16_t(sign | (bits - 0x3f000000u))};
  }
  bits += 0xc8000000u + 0xfffu + ((bits >> 13) & 1u);
  return {uint16_t(sign | (bits >> 13))};
}

template <class V = vf>
IDDPM_INLINE V load(const BFloat16* p) {
  Halves<V> h;
  std::memcpy(&h, p, sizeof h);
  return (V)(__builtin_convertvector(h, Words<V>) << 16);
}

// Rounded like to_bfloat16, except that the instruction takes subnormal numbers for zero.
template <class V>
IDDPM_INLINE void store(BFloat16* p, V v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_maskz_cvtneps_pbh(kAllLanes, (__m512)v);
  std::memcpy(p, &half, sizeof half);
#else
  const Words<V> bits = (Words<V>)v;
  const Words<V> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words<V> quiet = (bits >> 16) | 0x40u;
  const Words<V> is_nan = (Words<V>)(v != v);
  const Halves<V> h = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), Halves<V>);
  std::memcpy(p, &h, sizeof h);
#endif
}

IDDPM_INLINE vf load(const Float16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(kAllLanes,
                                   _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  const __m128i* half = reinterpret_cast<const __m128i*>(p);
  const __m256 part[2] = {_mm256_cvtph_ps(_mm_loadu_si128(half)),
                          _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
  vf v;
  std::memcpy(&v, part, sizeof v);
  return v;
#else
  vf v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

IDDPM_INLINE void store(Float16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 part[2];
  std::memcpy(part, &v, sizeof v);
  __m128i* half = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(half, _mm256_cvtps_ph(part[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(half + 1, _mm256_cvtps_ph(part[1], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < kLanes; ++i) p[i] = to_float16(v[i]);
#endif
}

// The first n <= 16 elements from p, zero in the other lanes.
template <typename T>
IDDPM_INLINE vf load_some(const T* p, int64_t n) {
  if (n == kLanes) return load(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  T lane[kLanes];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane),
                      _mm256_maskz_loadu_epi16(__mmask16(mask), p));
#else
  T lane[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
#endif
  return load(lane);
}

template <typename T>
IDDPM_INLINE void store_some(T* p, vf v, int64_t n) {
  if (n == kLanes) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
#endif
  T lane[kLanes];
  store(lane, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
}

// Calls f with a value of the dtype's element type.
template <typename F>
IDDPM_INLINE void with_element(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
