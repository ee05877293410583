// The forward process in one step (iddpm_ext/ops/q_sample/__init__.py has the equation).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/philox.h"

namespace iddpm {

struct QSampleArgs {
  int64_t n, c, hw, num_timesteps;
  Plane x_0;           // float32 [N, C, HW]
  const int64_t* t;    // [N]
  const float* table;  // [T, 16]
  Plane noise;         // float32 [N, C, HW], or a null address
  NoiseKey key;        // draws the noise where its addresses are not null
  Plane x_t;           // float32 [N, C, HW]
};

int q_sample_cuda(const QSampleArgs& args, void* stream);

}  // namespace iddpm

IDDPM_DECLARE_CPU(void, q_sample, (const iddpm::QSampleArgs& args, int num_threads))
