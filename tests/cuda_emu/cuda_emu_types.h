// CUDA's types and arithmetic for the CUDA emulator. The fast functions are computed exactly here:
// what a device's approximations cost in accuracy, the emulator does not tell.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline
#define __shared__ take_shared_memory_by_IDDPM_SMEM

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_EMU_VECTORS(T, name)                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_EMU_VECTORS(float, float)
CUDA_EMU_VECTORS(int, int)
CUDA_EMU_VECTORS(unsigned, uint)
#undef CUDA_EMU_VECTORS

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const float magnitude =
      (x.bits & 0x7C00) == 0x7C00 ? ((x.bits & 0x3FF) ? NAN : INFINITY)
      : (x.bits & 0x7C00) == 0
          ? ldexpf(static_cast<float>(x.bits & 0x3FF), -24)
          : ldexpf(static_cast<float>((x.bits & 0x3FF) | 0x400), (x.bits >> 10 & 31) - 25);
  return (x.bits & 0x8000) ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  const float magnitude = fabsf(x);
  if (isnan(x)) return {0x7FFF};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  int exponent = 0;
  frexpf(magnitude, &exponent);
  const bool subnormal = magnitude < 0x1p-14f;
  const int ulp = subnormal ? -24 : exponent - 11;
  const int steps = static_cast<int>(nearbyintf(ldexpf(magnitude, -ulp)));
  const int biased = subnormal ? 0 : exponent + 13;  // a carry of steps runs into the exponent
  return {uint16_t(sign | ((biased << 10) + steps))};
}

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (isnan(x)) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

// In the kernels' namespace, because the C library has some of these names of its own.
namespace iddpm {

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float sinpif(float x) { return static_cast<float>(sin(M_PI * x)); }
inline float cospif(float x) { return static_cast<float>(cos(M_PI * x)); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float normcdff(float x) { return static_cast<float>(0.5 * erfc(-x * M_SQRT1_2)); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }

}  // namespace iddpm
