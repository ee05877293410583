// Functions to 13 bits, for what is rounded to bfloat16, where that is faster.
#pragma once

#include "common/simd_math.h"

namespace iddpm {
namespace IDDPM_ISA {

// x / (1 + e^-x); of -inf it becomes NaN, as PyTorch's. 2^x may be infinite here.
template <class V>
IDDPM_INLINE V silu_coarse(V x) {
#if defined(__AVX512F__)
  return by_register(x, [](nv v) {
    const nv d = exp2_coarse(v * -1.44269504f) + 1.0f;
    return v * (nv)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)d);
  });
#else
  return silu(x);
#endif
}

// Its derivative, s (1 + x (1 - s)) with s the sigmoid; 1 - s = e^-x s does not cancel.
template <class V>
IDDPM_INLINE V silu_slope_coarse(V x) {
#if defined(__AVX512F__)
  return by_register(x, [](nv v) {
    const nv e = exp2_coarse(min(splat<nv>(126.0f), v * -1.44269504f));
    const nv s = (nv)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)(e + 1.0f));
    return s * (1.0f + v * (e * s));
  });
#else
  const V s = sigmoid(x);
  return s + x * (s * (1.0f - s));
#endif
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
