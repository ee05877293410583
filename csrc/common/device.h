// Queries of the CUDA runtime, which is linked statically into the module.
#pragma once

namespace iddpm {

// Writes the number of usable devices to *count and returns the CUDA error code (0: no error).
int cuda_device_count(int* count);

// The runtime's name and text for an error code that a launcher returned.
const char* cuda_error_name(int code);
const char* cuda_error_text(int code);

// 1000 * major + 10 * minor of the runtime in the module and of the installed driver (0: none).
int cuda_runtime_version();
int cuda_driver_version();

}  // namespace iddpm
