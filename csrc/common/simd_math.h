// Elementary functions of vectors.
//
// `exp` is accurate to 1 ulp. Where a relative error of 1e-7 suffices (softmax, the sigmoid), 2^x
// and e^x by one polynomial take half the time.
#pragma once

#include "common/simd.h"

namespace iddpm {
namespace IDDPM_ISA {

// p * 2^n for |n| < 250, by two factors because 2^n may be out of range; AVX-512 has an instruction
// for it.
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
  const vf n = round(bounded * 1.44269504f);
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

// ln x within 1 ulp for normal positive x; undefined for other x.
IDDPM_INLINE vf log(vf x) {
  const vi bits = as_int(x);
  const vi shifted = bits - 0x3f3504f3;  // sqrt(1/2): brings the mantissa to [0.707, 1.414)
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
  const vf quarters = round(u * 4.0f);
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

// p * 2^n for an integer n >= -126 and p in [1/2, 2]; with AVX-512, p * 2^floor(n) for any n.
IDDPM_INLINE nv add_exponent(nv p, nv n) {
#if defined(__AVX512F__)
  return (nv)_mm512_maskz_scalef_ps(kAllLanes, (__m512)p, (__m512)n);
#else
  return (nv)((Ints<nv>)p + (__builtin_convertvector(n, Ints<nv>) << 23));
#endif
}

// 2^f for f in [-1/2, 1/2], relative error 8e-8 (minimax, degree 5).
IDDPM_INLINE nv exp2_fraction(nv f) {
  nv p = splat<nv>(1.3276471979e-3f);
  p = p * f + 9.6755413344e-3f;
  p = p * f + 5.5507132734e-2f;
  p = p * f + 2.4022119724e-1f;
  p = p * f + 6.9314696707e-1f;
  return p * f + 1.0f;
}

// 2^x for x <= 127; results below the smallest normal number are zero or close to it, and NaN stays
// NaN.
IDDPM_INLINE nv exp2_bounded(nv x) {
#if !defined(__AVX512F__)
  x = max(splat<nv>(-126.0f), x);
#endif
  const nv n = round(x);
  return add_exponent(exp2_fraction(x - n), n);
}

// The same with a relative error of 1e-4 if that is faster, for results that are rounded to
// bfloat16.
IDDPM_INLINE nv exp2_coarse(nv x) {
#if defined(__AVX512F__)
  const nv f = (nv)_mm512_maskz_reduce_ps(kAllLanes, (__m512)x, 9);  // x - floor(x)
  nv p = splat<nv>(7.8024520e-2f);
  p = p * f + 2.2606716e-1f;
  p = p * f + 6.9583354e-1f;
  return add_exponent(p * f + 9.9992522e-1f, x);  // by floor(x)
#else
  return exp2_bounded(x);
#endif
}

// e^x for |x| <= 87.
IDDPM_INLINE nv exp_bounded(nv x) {
  const float log2e = 1.44269504f, log2e_rest = 1.92596299e-8f;
  const nv n = round(x * log2e);
  return add_exponent(exp2_fraction((x * log2e - n) + x * log2e_rest), n);
}

// x / d for d in [1, 1e38]. With AVX-512 by an estimate of 14 bits and one Newton step, in a third
// of the time of a division.
IDDPM_INLINE nv quotient(nv x, nv d) {
#if defined(__AVX512F__)
  const nv r = (nv)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)d);
  return x * (r + r * (1.0f - d * r));
#else
  return x / d;
#endif
}

// Where the sigmoid is 0 or 1 within 1e-37.
constexpr float kSigmoidReach = 87.0f;

// 1 + e^-x, bounded.
IDDPM_INLINE nv sigmoid_divisor(nv x) {
  return exp_bounded(clamp(-x, -kSigmoidReach, kSigmoidReach)) + 1.0f;
}

// 1 / (1 + e^-x); NaN stays NaN.
template <class V>
IDDPM_INLINE V sigmoid(V x) {
  return by_register(x, [](nv v) { return quotient(splat<nv>(1.0f), sigmoid_divisor(v)); });
}

// x / (1 + e^-x), and 0 below -kSigmoidReach, where the bounded sigmoid would make it grow with x.
// NaN stays NaN, and -inf gives NaN, as in PyTorch.
template <class V>
IDDPM_INLINE V silu(V x) {
  return by_register(x, [](nv v) {
    const nv kept = select(v < -kSigmoidReach, v * 0.0f, v);
    return quotient(kept, sigmoid_divisor(v));
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
