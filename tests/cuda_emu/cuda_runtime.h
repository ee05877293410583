// The CUDA runtime as the emulator has it: one device, and errors that carry the emulator's words.
#pragma once

#include "cuda_emu.h"

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "emulated launch"; }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_emu_message(); }
