// The two parts of the hybrid loss of each example, with their gradients in the network's output
// (iddpm_ext/ops/hybrid_loss/__init__.py has the equations).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/philox.h"

namespace iddpm {

struct HybridLossArgs {
  int64_t n, c, hw, num_timesteps;
  Plane model_output;  // [N, 2C, HW]
  DType output_dtype;
  Plane x_0, x_t;      // float32 [N, C, HW]
  Plane noise;         // float32 [N, C, HW], or a null address
  NoiseKey key;        // draws the noise where its addresses are not null
  const int64_t* t;    // [N]
  const float* table;  // [T, 16]
  float* mse;          // [N]
  float* vlb;          // [N], bits per dimension
  Plane gradient;      // of mse in the first C channels, of vlb in the others; or a null address
};

int hybrid_loss_cuda(const HybridLossArgs& args, void* stream);

}  // namespace iddpm

IDDPM_DECLARE_CPU(void, hybrid_loss, (const iddpm::HybridLossArgs& args, int num_threads))
