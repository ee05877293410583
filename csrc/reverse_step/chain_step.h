// One step of the reverse chain for a CUDA graph: everything that changes from step to step or from
// call to call is read from device memory, and x is overwritten.
#pragma once

#include "common/dtype.h"

namespace iddpm {

struct ChainStepArgs {
  int64_t n, c, hw, num_timesteps;
  Plane x;             // float32 [N, C, HW]: x_t before, x_{t-1} after
  Plane model_output;  // [N, C or 2C, HW]
  Plane
      unlabelled;  // the output without labels, for guidance, like model_output; or a null address
  DType output_dtype;
  bool learned_variance;   // model_output has 2C channels
  const int64_t* t;        // [1], the step to take
  const float* table;      // [T, 16]
  const int64_t* seed;     // [1], the bits of the seed
  const int64_t* samples;  // [N], the images' indices; a null address draws no noise
  const float* scale;      // [1], of the guidance
  uint32_t stream_draw;
  bool clip;
};

int chain_step_cuda(const ChainStepArgs& args, void* stream);

}  // namespace iddpm
