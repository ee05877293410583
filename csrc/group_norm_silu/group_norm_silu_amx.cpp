// bfloat16 on CPUs with AMX, which round in one instruction.
#include "group_norm_silu/group_norm_forward.h"

namespace iddpm {
namespace IDDPM_ISA {

void group_norm_silu_rounded(const GroupNormSiluArgs& args, int num_threads) {
  normalise<BFloat16>(args, num_threads);
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
