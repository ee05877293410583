#include "checksum/checksum.cuh"

namespace iddpm {

int checksum_cuda(const ChecksumArgs& args, void* stream) {
  checksum_launch(args, stream);
  return launch_status();
}

}  // namespace iddpm
