// The discretized likelihood with the normal distribution function itself, in double precision:
// accurate hundreds of standard deviations out. Scalar, since it is used at the last step only, on
// request.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace iddpm {

// log Phi(x): by erfc where that is a normal number, else by its asymptotic series.
IDDPM_HD double log_normal_cdf(double x) {
  if (x > 6.0) return log1p(-0.5 * erfc(x * 0.7071067811865476));
  if (x > -14.0) return log(0.5 * erfc(-x * 0.7071067811865476));
  const double r = 1.0 / (x * x);
  const double series = r * (-1.0 + r * (3.0 + r * (-15.0 + r * (105.0 - 945.0 * r))));
  return -0.5 * x * x - log(-x) - 0.9189385332046727 + log1p(series);
}

IDDPM_HD double log_normal_density(double x) { return -0.5 * x * x - 0.9189385332046727; }

struct ExactTerm {
  double value, d_mean, d_lv;
};

// As decoder_term in gaussian.h, without the clamp at 1e-12.
IDDPM_HD ExactTerm exact_decoder_term(double x, double mean, double lv) {
  const double half_bin = 1.0 / 255.0;
  const double inverse = exp(-0.5 * lv);
  const double centred = x - mean;
  const bool edge = x < -0.999 || x > 0.999;
  const double side = edge ? (x > 0.0 ? -1.0 : 1.0) : (centred > 0.0 ? -1.0 : 1.0);
  const double upper = inverse * (side * centred + half_bin);
  const double lower = inverse * (side * centred - half_bin);
  double log_probability = log_normal_cdf(upper);
  double left_density = 0.0;
  if (!edge) {
    log_probability += log(-expm1(log_normal_cdf(lower) - log_probability));
    left_density = exp(log_normal_density(lower) - log_probability);
  }
  const double right_density = exp(log_normal_density(upper) - log_probability);
  return {-log_probability, side * inverse * (right_density - left_density),
          0.5 * (right_density * upper - left_density * lower)};
}

}  // namespace iddpm
