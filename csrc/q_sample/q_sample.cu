#include "q_sample/q_sample.cuh"

namespace iddpm {

int q_sample_cuda(const QSampleArgs& args, void* stream) {
  if (args.n * args.c * args.hw == 0) return 0;
  q_sample_launch(args, stream);
  return launch_status();
}

}  // namespace iddpm
