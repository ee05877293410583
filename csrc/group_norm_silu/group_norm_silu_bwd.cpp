#include "group_norm_silu/group_norm_backward.h"

namespace iddpm {
namespace IDDPM_ISA {

void group_norm_silu_bwd(const GroupNormSiluBwdArgs& args, int num_threads) {
  const auto rounding = IDDPM_AMX(group_norm_silu_bwd_rounded);
  if (rounding && args.in.dtype == DType::kBFloat16) return rounding(args, num_threads);
  with_element(args.in.dtype,
               [&](auto element) { differentiate<decltype(element)>(args, num_threads); });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
