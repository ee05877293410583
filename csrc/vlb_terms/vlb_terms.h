// One term of the variational bound for each example, in bits per dimension, with its gradient in
// the network's output (iddpm_ext/ops/vlb_terms/__init__.py has the equations).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace iddpm {

struct VlbTermsArgs {
  int64_t n, c, hw, num_timesteps;
  Plane model_output;  // [N, C or 2C, HW]
  DType output_dtype;
  bool learned_variance;  // model_output has 2C channels
  Plane x_0, x_t;         // float32 [N, C, HW]
  const int64_t* t;       // [N]
  const float* table;     // [T, 16]
  bool clip, exact;
  float* terms;    // [N]
  Plane gradient;  // like model_output, of its dtype, or a null address
};

int vlb_terms_cuda(const VlbTermsArgs& args, void* stream);

}  // namespace iddpm

IDDPM_DECLARE_CPU(void, vlb_terms, (const iddpm::VlbTermsArgs& args, int num_threads))
