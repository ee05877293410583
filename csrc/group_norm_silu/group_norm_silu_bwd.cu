#include "group_norm_silu/group_norm_silu_bwd.cuh"

namespace iddpm {
namespace {

template <typename T>
void launch(const GroupNormSiluBwdArgs& args, void* stream) {
  args.in.silu ? launch_backward<T, true>(args, stream) : launch_backward<T, false>(args, stream);
}

}  // namespace

int group_norm_silu_bwd_cuda(const GroupNormSiluBwdArgs& args, void* stream) {
  if (args.in.n * args.in.c * args.in.hw == 0) return 0;
  switch (args.in.dtype) {
    case DType::kFloat32:
      launch<float>(args, stream);
      break;
    case DType::kBFloat16:
      launch<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      launch<__half>(args, stream);
      break;
  }
  return launch_status();
}

}  // namespace iddpm
