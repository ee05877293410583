// Vectors of float lanes, for every instruction set and compiler.
//
// A vector is `vf`, sixteen lanes everywhere, or `nv`, one register of the instruction set in use,
// for kernels that plan their use of registers; with AVX-512 they are the same type. Functions take
// either. GCC and clang lower sixteen lanes to one zmm, two ymm or four xmm registers (or NEON's),
// so one source suffices for all builds, and sums have the same order everywhere; only fused
// multiply-adds differ. Everything is inlined, in the namespace of its instruction set, so that the
// linker cannot merge copies of different builds.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.h"

#if IDDPM_X86
#include <immintrin.h>
#endif

#define IDDPM_INLINE static inline __attribute__((always_inline))

// Before a loop with a small constant number of steps: unrolls it completely, so that arrays of
// vectors are kept in registers.
#if defined(__clang__)
#define IDDPM_UNROLL _Pragma("unroll")
#else
#define IDDPM_UNROLL _Pragma("GCC unroll 32")
#endif

namespace iddpm {
namespace IDDPM_ISA {

constexpr int64_t kLanes = 16;  // of vf

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;  // lanes of nv
// The mask of all lanes: without one, gcc 12 warns about uninitialised variables of its own header.
constexpr __mmask16 kAllLanes = 0xffff;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif

template <class T, int64_t n>
struct VectorOf {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
template <class T, int64_t n>
using Vector = typename VectorOf<T, n>::type;

using vf = Vector<float, kLanes>;
using vi = Vector<int32_t, kLanes>;
using vu = Vector<uint32_t, kLanes>;
using nv = Vector<float, kWidth>;

// The lanes of a vector of floats, and vectors of as many integers.
template <class V>
constexpr int64_t kLanesOf = sizeof(V) / sizeof(float);
template <class V>
using Ints = Vector<int32_t, kLanesOf<V>>;
template <class V>
using Words = Vector<uint32_t, kLanesOf<V>>;
template <class V>
using Halves = Vector<uint16_t, kLanesOf<V>>;

// A vector of lanes of a and b, selected by index; b's lanes count after a's.
#if defined(__clang__)
#define IDDPM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define IDDPM_SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, ::iddpm::IDDPM_ISA::Ints<decltype(a)>{__VA_ARGS__})
#endif

// Not V{} + a, which turns -0 into 0.
template <class V = vf>
IDDPM_INLINE V splat(float a) {
  return a - V{};
}

template <class V = vf>
IDDPM_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
IDDPM_INLINE void store(float* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

IDDPM_INLINE vi as_int(vf v) { return (vi)v; }
IDDPM_INLINE vf as_float(vi v) { return (vf)v; }

// mask lanes are all ones or all zeros, as a comparison gives them.
template <class V>
IDDPM_INLINE V select(Ints<V> mask, V yes, V no) {
  return (V)((mask & (Ints<V>)yes) | (~mask & (Ints<V>)no));
}

// Applies f to every register of the vectors. For operations that compilers lower badly: gcc 12
// compares vectors that are wider than a register lane by lane.
template <class V, class F>
IDDPM_INLINE V by_register(V x, F f) {
  if constexpr (sizeof(V) == sizeof(nv)) {
    return f(x);
  } else {
    nv part[sizeof(V) / sizeof(nv)];
    std::memcpy(part, &x, sizeof x);
    for (nv& v : part) v = f(v);
    std::memcpy(&x, part, sizeof x);
    return x;
  }
}

// The second operand if one is NaN.
IDDPM_INLINE nv max(nv x, nv y) {
#if defined(__AVX512F__)
  return (nv)_mm512_maskz_max_ps(kAllLanes, (__m512)x, (__m512)y);
#elif defined(__AVX2__)
  return (nv)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
  return (nv)_mm_max_ps((__m128)x, (__m128)y);
#else
  return select(x > y, x, y);
#endif
}

IDDPM_INLINE nv min(nv x, nv y) {
#if defined(__AVX512F__)
  return (nv)_mm512_maskz_min_ps(kAllLanes, (__m512)x, (__m512)y);
#elif defined(__AVX2__)
  return (nv)_mm256_min_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
  return (nv)_mm_min_ps((__m128)x, (__m128)y);
#else
  return select(x < y, x, y);
#endif
}

// NaN stays NaN.
template <class V>
IDDPM_INLINE V clamp(V x, float low, float high) {
  return by_register(x, [&](nv v) { return min(splat<nv>(high), max(splat<nv>(low), v)); });
}

// The nearest integer (ties to even) of |x| < 2^22; NaN stays NaN.
template <class V>
IDDPM_INLINE V round(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_roundscale_ps(kAllLanes, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return by_register(x, [](nv v) {
    return (nv)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  });
#else
  return (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the mantissa's last bit has the value 1
#endif
}

// The first `count` lanes (all, if it is 16 or more; none, if it is not positive), zero in the
// others.
IDDPM_INLINE vf first_lanes(vf v, int64_t count) {
  if (count >= kLanes) return v;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(lane < vi{} + int32_t(count), v, vf{});
}

// Pairwise, so that the order does not depend on the instruction set.
template <class V>
IDDPM_INLINE float sum(V v) {
  if constexpr (kLanesOf<V> > 4) {
    Vector<float, kLanesOf<V> / 2> half[2];
    std::memcpy(half, &v, sizeof v);
    return sum(half[0] + half[1]);
  } else {
    return (v[0] + v[2]) + (v[1] + v[3]);
  }
}

// The largest lane of a register.
IDDPM_INLINE float largest(nv v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int64_t i = 1; i < kWidth; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

IDDPM_INLINE vf sqrt(vf x) {
  vf y;
  for (int64_t i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
