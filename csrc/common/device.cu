#include <cuda_runtime.h>

#include "common/device.h"

namespace iddpm {

int cuda_device_count(int* count) {
  *count = 0;
  const cudaError_t code = cudaGetDeviceCount(count);
  cudaGetLastError();  // an absent driver must not surface as the next launch's error
  return code;
}

const char* cuda_error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }

const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int cuda_runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int cuda_driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

}  // namespace iddpm
