#include "end_convs/end_convs.cuh"

namespace iddpm {

int first_conv_cuda(const FirstConvArgs& args, void* stream) {
  if (args.n * args.height * args.width * args.k == 0) return 0;
  switch (args.dtype) {
    case DType::kFloat32:
      launch_first_conv<float>(args, stream);
      break;
    case DType::kBFloat16:
      launch_first_conv<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      launch_first_conv<__half>(args, stream);
      break;
  }
  return launch_status();
}

int last_conv_cuda(const LastConvArgs& args, void* stream) {
  if (args.n * args.height * args.width == 0) return 0;
  switch (args.dtype) {
    case DType::kFloat32:
      launch_last_conv<float>(args, stream);
      break;
    case DType::kBFloat16:
      launch_last_conv<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      launch_last_conv<__half>(args, stream);
      break;
  }
  return launch_status();
}

}  // namespace iddpm
