#include "hybrid_loss/hybrid_loss.cuh"

namespace iddpm {

int hybrid_loss_cuda(const HybridLossArgs& args, void* stream) {
  if (args.n * args.c * args.hw == 0) return 0;
  switch (args.output_dtype) {
    case DType::kFloat32:
      hybrid_loss_launch<float>(args, stream);
      break;
    case DType::kBFloat16:
      hybrid_loss_launch<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      hybrid_loss_launch<__half>(args, stream);
      break;
  }
  return launch_status();
}

}  // namespace iddpm
