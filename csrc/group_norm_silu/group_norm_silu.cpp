#include "group_norm_silu/group_norm_silu.h"

#include "group_norm_silu/group_norm_forward.h"

namespace iddpm {
namespace IDDPM_ISA {

void group_norm_silu(const GroupNormSiluArgs& args, int num_threads) {
  const auto rounding = IDDPM_AMX(group_norm_silu_rounded);
  if (rounding && args.in.dtype == DType::kBFloat16) return rounding(args, num_threads);
  with_element(args.in.dtype,
               [&](auto element) { normalise<decltype(element)>(args, num_threads); });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
