// Whether the calling thread treats subnormal numbers as zero, and how it rounds.
#pragma once

#include <cstdint>

#include "common/isa.h"

#if IDDPM_X86
#include <xmmintrin.h>
#endif

namespace iddpm {
namespace IDDPM_ISA {

using FloatMode = uint64_t;

static inline FloatMode float_mode() {
#if IDDPM_X86
  return _mm_getcsr() & ~FloatMode{_MM_EXCEPT_MASK};
#elif defined(__aarch64__)
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

// Returns the previous mode.
static inline FloatMode set_float_mode(FloatMode mode) {
  const FloatMode before = float_mode();
  if (mode == before) return before;
#if IDDPM_X86
  _mm_setcsr(uint32_t(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
  return before;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
