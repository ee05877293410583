// One step of the reverse chain (iddpm_ext/ops/reverse_step/__init__.py has the equation).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/philox.h"

namespace iddpm {

struct ReverseStepArgs {
  int64_t n, c, hw, num_timesteps;
  Plane x_t;           // float32 [N, C, HW]
  Plane model_output;  // [N, C or 2C, HW]
  DType output_dtype;
  bool learned_variance;  // model_output has 2C channels
  const int64_t* t;       // [N]
  const float* table;     // [T, 16]
  Plane noise;            // float32 [N, C, HW], or a null address
  NoiseKey key;           // draws the noise where its addresses are not null
  bool clip;
  Plane x_prev, x_0;  // float32 [N, C, HW]
};

int reverse_step_cuda(const ReverseStepArgs& args, void* stream);

}  // namespace iddpm

IDDPM_DECLARE_CPU(void, reverse_step, (const iddpm::ReverseStepArgs& args, int num_threads))
