// Sixteen float lanes in every instruction set, and the few functions that kernels need of them.
//
// GCC and clang lower a 64-byte vector to one zmm, two ymm or four xmm registers, so one source
// serves all three builds and sums run in the same order everywhere (only fused multiply-adds
// differ). Everything is always inlined and lives in the namespace of its build, so no copy can
// leak into another.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace iddpm {
namespace IDDPM_ISA {

constexpr int64_t kLanes = 16;

#if defined(__AVX512F__)
// The mask of all lanes: without one, gcc 12 warns about uninitialised variables of its own header.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));

#define IDDPM_INLINE static inline __attribute__((always_inline))

IDDPM_INLINE vf splat(float a) { return vf{} + a; }

IDDPM_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

IDDPM_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Lanes of a and b by their numbers, which are constants; those of b follow those of a.
template <typename V, typename L>
IDDPM_INLINE V shuffle(V a, V b, L lane) {
#if defined(__clang__)
  // Its builtin takes no vector of numbers; from this it makes the same instructions.
  constexpr int width = sizeof(V) / sizeof(a[0]);
  V picked = a;
  for (int i = 0; i < width; ++i) picked[i] = lane[i] < width ? a[lane[i]] : b[lane[i] - width];
  return picked;
#else
  return __builtin_shuffle(a, b, lane);
#endif
}

// The first n < 16 lanes from p, zero in the others.
IDDPM_INLINE vf load_tail(const float* p, int64_t n) {
  float lane[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return load(lane);
}

IDDPM_INLINE void store_tail(float* p, vf v, int64_t n) {
  float lane[kLanes];
  store(lane, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
}

IDDPM_INLINE vi as_int(vf v) { return (vi)v; }
IDDPM_INLINE vf as_float(vi v) { return (vf)v; }

// mask lanes are all ones or all zeros, as a comparison gives them.
IDDPM_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

IDDPM_INLINE vi select_mask(vi mask, vi yes, vi no) { return (mask & yes) | (~mask & no); }

// NaN in x stays NaN. In instructions, because gcc 12 compares vectors that are wider than the
// machine's lane by lane.
IDDPM_INLINE vf clamp(vf x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 above = _mm512_maskz_max_ps(kAllLanes, _mm512_set1_ps(low), (__m512)x);
  return (vf)_mm512_maskz_min_ps(kAllLanes, _mm512_set1_ps(high), above);
#elif defined(__AVX2__)
  __m256 part[2];
  std::memcpy(part, &x, sizeof x);
  for (__m256& v : part)
    v = _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), v));
  std::memcpy(&x, part, sizeof x);
  return x;
#elif defined(__SSE2__)
  __m128 part[4];
  std::memcpy(part, &x, sizeof x);
  for (__m128& v : part) v = _mm_min_ps(_mm_set1_ps(high), _mm_max_ps(_mm_set1_ps(low), v));
  std::memcpy(&x, part, sizeof x);
  return x;
#else
  x = select(x < splat(low), splat(low), x);
  return select(x > splat(high), splat(high), x);
#endif
}

// The first `count` lanes (all, if it is 16 or more; none, if it is not positive), zero in the
// others.
IDDPM_INLINE vf first_lanes(vf v, int64_t count) {
  if (count >= kLanes) return v;
  float lane[kLanes];
  store(lane, v);
  for (int64_t i = count > 0 ? count : 0; i < kLanes; ++i) lane[i] = 0.0f;
  return load(lane);
}

// Pairwise, so the order does not depend on the instruction set.
IDDPM_INLINE float sum(vf v) {
  typedef float half_lanes __attribute__((vector_size(32)));
  typedef float quarter_lanes __attribute__((vector_size(16)));
  half_lanes half[2];
  std::memcpy(half, &v, sizeof v);
  const half_lanes eight = half[0] + half[1];
  quarter_lanes quarter[2];
  std::memcpy(quarter, &eight, sizeof eight);
  const quarter_lanes four = quarter[0] + quarter[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

IDDPM_INLINE vf sqrt(vf x) {
  vf y;
  for (int64_t i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

// Nearest integer (ties to even) of |x| < 2^22, as a float: the mantissa's last bit becomes the
// ones.
IDDPM_INLINE vf round_small(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23
  return (x + magic) - magic;
}

// p * 2^n for |n| < 250, in two factors because 2^n need not be a float; AVX-512 has it as an
// instruction.
IDDPM_INLINE vf scale_by_power(vf p, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(kAllLanes, (__m512)p, (__m512)n);
#else
  const vi whole = __builtin_convertvector(n, vi);
  const vi half = whole >> 1;
  return p * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
#endif
}

// e^x within 1 ulp of a normal result; infinity above 88.73, 0 far below -103, NaN stays NaN.
IDDPM_INLINE vf exp(vf x) {
  const vf bounded = clamp(x, -150.0f, 150.0f);
  const vf n = round_small(bounded * 1.44269504f);
  vf r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return scale_by_power(p, n);
}

// ln x within 1 ulp for normal positive x; other inputs are the caller's to avoid.
IDDPM_INLINE vf log(vf x) {
  const vi bits = as_int(x);
  const vi shifted = bits - 0x3f3504f3;  // sqrt(1/2): the mantissa lands in [0.707, 1.414)
  const vf n = __builtin_convertvector(shifted >> 23, vf);
  const vf m = as_float((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vf tail = p * m * z - n * 2.12194440e-4f - 0.5f * z;
  return m + tail + n * 0.693359375f;
}

// sin and cos of 2*pi*u for u in [0, 1]; the reduction to a quarter turn is exact.
IDDPM_INLINE void sincos_turn(vf u, vf* sine, vf* cosine) {
  const vf quarters = round_small(u * 4.0f);
  const vf r = (u * 4.0f - quarters) * 1.57079632679f;
  const vf z = r * r;
  vf s = splat(-1.9515295891e-4f);
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * r + r;
  vf c = splat(2.443315711809948e-5f);
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  const vi q = __builtin_convertvector(quarters, vi);
  const vi swap = (q & 1) != 0;
  const vf s_turned = select(swap, c, s);
  const vf c_turned = select(swap, s, c);
  *sine = as_float(as_int(s_turned) ^ ((q & 2) << 30));
  *cosine = as_float(as_int(c_turned) ^ (((q + 1) & 2) << 30));
}

IDDPM_INLINE float from_bfloat16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

IDDPM_INLINE uint16_t to_bfloat16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);  // quiet NaN
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

IDDPM_INLINE vf load_bfloat16(const uint16_t* p) {
  typedef uint16_t half_lanes __attribute__((vector_size(32)));
  half_lanes h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

IDDPM_INLINE void store_bfloat16(uint16_t* p, vf v) {
  typedef uint16_t half_lanes __attribute__((vector_size(32)));
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  const vu is_nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
  const half_lanes h = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), half_lanes);
  std::memcpy(p, &h, sizeof h);
}

// IEEE half precision without F16C; subnormals, infinities and NaN included.
IDDPM_INLINE float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  float f;
  if (magnitude >= 0x0f800000u) {
    magnitude += 0x70000000u;  // infinity, NaN
    magnitude |= sign;
    std::memcpy(&f, &magnitude, sizeof f);
    return f;
  }
  std::memcpy(&f, &magnitude, sizeof f);
  f *= 5.192296858534828e33f;  // 2^112 moves the exponent, and makes subnormals normal
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  bits |= sign;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

IDDPM_INLINE uint16_t to_float16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets the hardware round
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000000u + 0xfffu + ((bits >> 13) & 1u);
  return uint16_t(sign | (bits >> 13));
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
