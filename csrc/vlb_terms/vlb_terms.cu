#include "vlb_terms/vlb_terms.cuh"

namespace iddpm {

int vlb_terms_cuda(const VlbTermsArgs& args, void* stream) {
  if (args.n * args.c * args.hw == 0) return 0;
  switch (args.output_dtype) {
    case DType::kFloat32:
      vlb_terms_launch<float>(args, stream);
      break;
    case DType::kBFloat16:
      vlb_terms_launch<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      vlb_terms_launch<__half>(args, stream);
      break;
  }
  return launch_status();
}

}  // namespace iddpm
