// SiLU and the sigmoid in sixteen lanes.
#pragma once

#include "common/simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace iddpm {
namespace IDDPM_ISA {

// e^-x. The factor of 2^f on [-1/2, 1/2] has a relative error of 7.5e-8 (minimax, degree 5).
// Without AVX-512 it saturates at 2^-126 and 2^126, which a sigmoid cannot tell from 0 and
// infinity.
IDDPM_INLINE vf exp_negative(vf x) {
  vf t = x * -1.44269504f;
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_maskz_roundscale_ps(kAllLanes, (__m512)t, _MM_FROUND_TO_NEAREST_INT);
#else
  t = clamp(t, -126.0f, 126.0f);
  const vf n = round_small(t);
#endif
  const vf f = t - n;
  vf p = splat(1.3276455e-3f);
  p = p * f + 9.6755400e-3f;
  p = p * f + 5.5507135e-2f;
  p = p * f + 2.4022120e-1f;
  p = p * f + 6.9314694e-1f;
  p = p * f + 1.0000001f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(kAllLanes, (__m512)p, (__m512)n);
#else
  return as_float(as_int(p) + (__builtin_convertvector(n, vi) << 23));
#endif
}

// 1 / d for d >= 1. With AVX-512 an estimate of 14 bits and one Newton step, which take a third of
// a division's time; where d is infinite the estimate is 0 already.
IDDPM_INLINE vf reciprocal(vf d) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)d);
  // The second operand where the first is NaN.
  const vf rest = (vf)_mm512_maskz_min_ps(kAllLanes, (__m512)(1.0f - d * r), _mm512_set1_ps(1.0f));
  return r + r * rest;
#else
  return 1.0f / d;
#endif
}

IDDPM_INLINE vf sigmoid(vf x) { return reciprocal(1.0f + exp_negative(x)); }

IDDPM_INLINE vf silu(vf x) { return x * reciprocal(1.0f + exp_negative(x)); }

}  // namespace IDDPM_ISA
}  // namespace iddpm
