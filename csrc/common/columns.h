// The columns of the coefficient table; iddpm_ext/ops/columns.py says what each is.
#pragma once

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

}  // namespace iddpm
