#include "reverse_step/reverse_step.cuh"

namespace iddpm {

int reverse_step_cuda(const ReverseStepArgs& args, void* stream) {
  if (args.n * args.c * args.hw == 0) return 0;
  switch (args.output_dtype) {
    case DType::kFloat32:
      reverse_step_launch<float>(args, stream);
      break;
    case DType::kBFloat16:
      reverse_step_launch<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      reverse_step_launch<__half>(args, stream);
      break;
  }
  return launch_status();
}

}  // namespace iddpm
