// One CPU source for several instruction sets, selected at run time.
//
// The build compiles every csrc/<op>/<op>.cpp once per instruction set with IDDPM_ISA defined as
// base, avx2 or avx512 and the matching compiler flags. Such a file defines its functions in
//
//   namespace iddpm { namespace IDDPM_ISA { ... } }
//
// and includes no libstdc++ template: an inline function that the AVX-512 copy emits with weak
// linkage could be the copy that the linker keeps, and would crash an older CPU.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define IDDPM_X86 1
#else
#define IDDPM_X86 0
#endif

namespace iddpm {

// kAmx: AVX-512's kernels, and those of common/amx.h beside them.
enum Isa { kBase = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

inline constexpr const char* kIsaNames[] = {"base", "avx2", "avx512", "amx"};

// The best instruction set that was compiled and that this CPU and its operating system support;
// -1 if the CPU lacks even the baseline (SSE4.2 on x86-64).
int best_isa();

// The instruction set in use: best_isa(), or that of the environment's IDDPM_ISA or of set_isa().
int current_isa();

// Whether AVX-512 is in use and this CPU has its bfloat16 products (vdpbf16ps) as well.
bool has_bf16();

// Uses `isa` from now on; false, and no change, if this CPU cannot run it.
bool set_isa(int isa);

}  // namespace iddpm

#if IDDPM_X86

// Declares `ret name params` in every instruction set's namespace. Use at global scope.
#define IDDPM_DECLARE_CPU(ret, name, params) \
  namespace iddpm {                          \
  namespace base {                           \
  ret name params;                           \
  }                                          \
  namespace avx2 {                           \
  ret name params;                           \
  }                                          \
  namespace avx512 {                         \
  ret name params;                           \
  }                                          \
  }

// The function pointer for the instruction set in use.
#define IDDPM_DISPATCH(name)                                           \
  (::iddpm::current_isa() >= ::iddpm::kAvx512 ? &::iddpm::avx512::name \
   : ::iddpm::current_isa() == ::iddpm::kAvx2 ? &::iddpm::avx2::name   \
                                              : &::iddpm::base::name)

#else

#define IDDPM_DECLARE_CPU(ret, name, params) \
  namespace iddpm {                          \
  namespace base {                           \
  ret name params;                           \
  }                                          \
  }

#define IDDPM_DISPATCH(name) (&::iddpm::base::name)

#endif
