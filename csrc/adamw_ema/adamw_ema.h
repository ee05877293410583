// AdamW and moving averages over a list of tensors (iddpm_ext/ops/adamw_ema/__init__.py has the
// equations).
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/isa.h"

namespace iddpm {

struct AdamwEmaArgs {
  int64_t tensors, emas;
  // Host memory, a row of 6 + emas for each tensor: numel, then the addresses of param, grad,
  // exp_avg, exp_avg_sq, copy (0 for none) and of each average, all dense with equal strides.
  const int64_t* table;
  DType grad_dtype, copy_dtype;
  // One float each, on the device, or null: the step, the factor of the gradients, and whether to
  // skip the update (not 0).
  const float *step_tensor, *grad_scale, *found_inf;
  double step, lr, beta1, beta2, eps, weight_decay;
  const double* decays;  // [emas], host memory
};

enum AdamwEmaField {
  kNumel,
  kParam,
  kGrad,
  kExpAvg,
  kExpAvgSq,
  kCopy,
  kFirstEma,
};

constexpr int kMaxEmas = 8;

int adamw_ema_cuda(const AdamwEmaArgs& args, void* stream);

}  // namespace iddpm

IDDPM_DECLARE_CPU(void, adamw_ema, (const iddpm::AdamwEmaArgs& args, int num_threads))
