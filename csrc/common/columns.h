// The columns of the coefficient table; iddpm_ext/ops/columns.py says what each is.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace iddpm {

enum Column {
  kX0FromXt,
  kX0FromOut,
  kMeanX0,
  kMeanXt,
  kLogVarianceBias,
  kLogVarianceScale,
  kNoiseScale,
  kPosteriorLogVariance,
  kSqrtAlphaBar,
  kSqrtOneMinusAlphaBar,
  kTargetX0,
  kTargetXt,
  kTargetNoise,
  kLogAlphaBarHigh,
  kLogAlphaBarLow,
  kStep,
  kNumColumns,
};

// Row t, or null where the table has no such step: kernels then write NaN.
IDDPM_HD const float* find_row(const float* table, int64_t t, int64_t num_timesteps) {
  return t >= 0 && t < num_timesteps ? table + t * kNumColumns : nullptr;
}

}  // namespace iddpm
