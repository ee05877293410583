#include "adamw_ema/adamw_ema.cuh"

namespace iddpm {

int adamw_ema_cuda(const AdamwEmaArgs& args, void* stream) {
  if (args.tensors == 0) return 0;
  adamw_ema_launch(args, stream);
  return launch_status();
}

}  // namespace iddpm
