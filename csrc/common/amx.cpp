#include "common/amx.h"

#include <atomic>

#if IDDPM_X86 && defined(IDDPM_WITH_AMX)
#include <cpuid.h>
#if defined(__linux__)
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace iddpm {
namespace {

#if IDDPM_X86 && defined(IDDPM_WITH_AMX)
bool has_amx_bf16() {
  unsigned eax, ebx, ecx, edx;
  const bool tiles =
      __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & (1u << 24)) && (edx & (1u << 22));
  return tiles && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
}

// Whether the operating system saves the tiles and their configuration when it switches tasks.
bool tiles_are_saved() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
}

const char* ask() {
  if (!has_amx_bf16()) return "this CPU has no amx_bf16";
  if (!tiles_are_saved()) return "the operating system does not save AMX tiles";
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return errno == ENOSPC ? "the kernel refuses AMX: a signal stack of this process is too small"
                         : "the kernel refuses AMX tiles to this process (arch_prctl)";
#else
  return "AMX is used on Linux alone";
#endif
}
#else
const char* ask() { return "the compiler of this build knows no AMX"; }
#endif

std::atomic<bool>& emulation() {
  static std::atomic<bool> on{false};
  return on;
}

}  // namespace

const char* amx_absence() {
  static const char* const reason = ask();
  return reason;
}

AmxKernels amx_kernels() {
  if (emulation().load(std::memory_order_relaxed)) return kEmulatedAmx;
  return current_isa() == kAmx ? kNativeAmx : kNoAmx;
}

bool emulate_amx(bool on) {
  if (on && (!IDDPM_X86 || current_isa() < kAvx2)) return false;
  emulation().store(on, std::memory_order_relaxed);
  return true;
}

}  // namespace iddpm
