#include "reverse_step/chain_step.cuh"

namespace iddpm {

int chain_step_cuda(const ChainStepArgs& args, void* stream) {
  if (args.n * args.c * args.hw == 0) return 0;
  switch (args.output_dtype) {
    case DType::kFloat32:
      chain_step_launch<float>(args, stream);
      break;
    case DType::kBFloat16:
      chain_step_launch<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      chain_step_launch<__half>(args, stream);
      break;
  }
  return launch_status();
}

}  // namespace iddpm
