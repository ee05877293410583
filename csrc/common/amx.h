// Whether the matrix tiles of AMX can be used, natively or emulated.
//
// Files named *_amx.cpp hold the kernels over tiles (nhwc/amx_tile.h). They are compiled twice:
// for CPUs that have the tiles, in namespace `amx`, and as plain C++ in namespace `amx_emulated`,
// so that every CPU with AVX2 can test them.
#pragma once

#include "common/isa.h"

namespace iddpm {

// "" if this process may use AMX, else the reason why not. The first call requests permission,
// which Linux grants to a process, its threads and its children.
const char* amx_absence();

enum AmxKernels { kNoAmx = 0, kNativeAmx = 1, kEmulatedAmx = 2 };

// Which compilation of the kernels is in use: the emulated one if it was requested, else the native
// one while `amx` is the instruction set in use.
AmxKernels amx_kernels();

// For tests; false if the emulation was not compiled or the instruction set in use is `base`.
bool emulate_amx(bool on);

}  // namespace iddpm

// Declares `ret name params` in both namespaces. Use at global scope.
#define IDDPM_DECLARE_AMX(ret, name, params) \
  namespace iddpm {                          \
  namespace amx {                            \
  ret name params;                           \
  }                                          \
  namespace amx_emulated {                   \
  ret name params;                           \
  }                                          \
  }

// The function of the compilation in use, or null.
#if IDDPM_X86 && defined(IDDPM_WITH_AMX)
#define IDDPM_AMX(name)                                                           \
  (::iddpm::amx_kernels() == ::iddpm::kEmulatedAmx ? &::iddpm::amx_emulated::name \
   : ::iddpm::amx_kernels() == ::iddpm::kNativeAmx ? &::iddpm::amx::name          \
                                                   : decltype(&::iddpm::amx::name){})
#elif IDDPM_X86
#define IDDPM_AMX(name)                                                           \
  (::iddpm::amx_kernels() == ::iddpm::kEmulatedAmx ? &::iddpm::amx_emulated::name \
                                                   : decltype(&::iddpm::amx_emulated::name){})
#else
#define IDDPM_AMX(name) (decltype(&::iddpm::amx::name){})
#endif
