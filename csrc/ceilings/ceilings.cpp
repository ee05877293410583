#include "ceilings/ceilings.h"

#if defined(__AVX2__)
#include "nhwc/panel.h"
#endif

namespace iddpm {
namespace IDDPM_ISA {

#if defined(__AVX2__)

double multiply_add_burst(int64_t rounds) {
  // As many independent chains as a register tile has accumulators, which hides the latency.
  constexpr int kChains = 2 * kTileRows;
  nv sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = splat<nv>(float(i));
  nv factor = splat<nv>(0.9375f), addend = splat<nv>(0.0625f);
  for (int64_t round = 0; round < rounds; ++round) {
    // Makes the two values opaque to the compiler, which would otherwise merge the rounds.
    asm volatile("" : "+x"(factor), "+x"(addend));
    IDDPM_UNROLL
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + addend;
  }
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "x"(sum[i]));
  return 2.0 * double(kChains) * double(kWidth) * double(rounds);
}

#else

double multiply_add_burst(int64_t) { return 0.0; }

#endif

}  // namespace IDDPM_ISA
}  // namespace iddpm
