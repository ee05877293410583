// IDDPM_HD marks a function that the host and the device share: nvcc compiles it for both, any
// other compiler for the host.
#pragma once

#if defined(__CUDACC__)
#define IDDPM_HD __host__ __device__ __forceinline__
#else
#define IDDPM_HD inline __attribute__((always_inline))
#endif
