#include "pixel_rows/pixel_rows.cuh"

namespace iddpm {

int channel_sums_cuda(const ChannelSumsArgs& args, void* stream) {
  if (args.rows * args.c == 0) return 0;
  switch (args.dtype) {
    case DType::kFloat32:
      launch_channel_sums<float>(args, stream);
      break;
    case DType::kBFloat16:
      launch_channel_sums<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      launch_channel_sums<__half>(args, stream);
      break;
  }
  return launch_status();
}

int settle_cuda(const SettleArgs& args, void* stream) {
  if (args.rows * args.c == 0) return 0;
  switch (args.dtype) {
    case DType::kFloat32:
      launch_settle<float>(args, stream);
      break;
    case DType::kBFloat16:
      launch_settle<__nv_bfloat16>(args, stream);
      break;
    case DType::kFloat16:
      launch_settle<__half>(args, stream);
      break;
  }
  return launch_status();
}

int interleave_cuda(const InterleaveArgs& args, void* stream) {
  if (args.n * args.height * args.width * args.c == 0) return 0;
  if (args.dtype == DType::kFloat32)
    launch_interleave<float>(args, stream);
  else  // 16-bit types, which are only copied
    launch_interleave<__half>(args, stream);
  return launch_status();
}

}  // namespace iddpm
