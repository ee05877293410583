// The bound's terms of every jump from t to an earlier step, in bits per dimension
// (iddpm_ext/ops/vlb_to_all/__init__.py has the equations).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace iddpm {

struct VlbToAllArgs {
  int64_t n, num_targets, count;  // count = C * H * W
  Plane model_output;             // float32 [N, 1 or 2, count], dense
  bool learned_variance;          // model_output has the second half
  Plane x_0, x_t;                 // float32 [N, 1, count], dense
  const float* rows;              // [N, S, 16]: each jump's row of coefficients; NaN for none
  const int64_t* targets;         // [S]; negative: the decoder's term
  bool clip, exact;
  float* terms;  // [N, S]
};

int vlb_to_all_cuda(const VlbToAllArgs& args, void* stream);

}  // namespace iddpm

IDDPM_DECLARE_CPU(void, vlb_to_all, (const iddpm::VlbToAllArgs& args, int num_threads))
