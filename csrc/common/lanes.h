// Sixteen elements of float32, bfloat16 or float16 in and out of float lanes, whole and in part.
#pragma once

#include "common/dtype.h"
#include "common/simd.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace iddpm {

// 16-bit elements as types of their own, so that overloads can tell them apart.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace IDDPM_ISA {

IDDPM_INLINE vf load(const BFloat16* p) {
  return load_bfloat16(reinterpret_cast<const uint16_t*>(p));
}

IDDPM_INLINE void store(BFloat16* p, vf v) { store_bfloat16(reinterpret_cast<uint16_t*>(p), v); }

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
  for (int64_t i = 0; i < kLanes; ++i) v[i] = from_float16(p[i].bits);
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
  for (int64_t i = 0; i < kLanes; ++i) p[i].bits = to_float16(v[i]);
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

// v in the first n lanes, zero in the others.
IDDPM_INLINE vf keep_first(vf v, int64_t n) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(lane < vi{} + int32_t(n), v, vf{});
}

// Calls f with a value of the type that a dtype's elements have.
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
