#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/amx.h"

#if IDDPM_X86
#include <cpuid.h>
#endif

namespace iddpm {
namespace {

#if IDDPM_X86
// __builtin_cpu_supports knows "f16c" only in recent compilers.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
}
#endif

int detect() {
#if IDDPM_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2")) return -1;
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()))
    return kBase;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return kAvx2;
  return has_avx512_bf16() && amx_absence()[0] == '\0' ? kAmx : kAvx512;
#else
  return kBase;
#endif
}

// An IDDPM_ISA that this CPU cannot run, or a CPU without any instruction set of the build, is
// ignored here: the bindings refuse it at import.
int initial() {
  const int best = best_isa();
  if (const char* asked = std::getenv("IDDPM_ISA"))
    for (int isa = kBase; isa <= best; ++isa)
      if (std::strcmp(asked, kIsaNames[isa]) == 0) return isa;
  return best;
}

std::atomic<int>& selected() {
  static std::atomic<int> isa{initial()};
  return isa;
}

}  // namespace

int best_isa() {
  static const int best = detect();
  return best;
}

int current_isa() { return selected().load(std::memory_order_relaxed); }

bool has_bf16() {
#if IDDPM_X86
  static const bool present = has_avx512_bf16();
  return present && current_isa() >= kAvx512;
#else
  return false;
#endif
}

bool set_isa(int isa) {
  if (isa < kBase || isa > best_isa()) return false;
  selected().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace iddpm
