#include "vlb_to_all/vlb_to_all.h"

#include "common/gaussian.h"
#include "common/gaussian_exact.h"
#include "common/lanes.h"
#include "common/threads.h"
#include "common/tile.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

vf exact_decoder_values(vf x, vf mean, vf lv) {
  float value[kLanes];
  for (int64_t i = 0; i < kLanes; ++i)
    value[i] = float(exact_decoder_term(x[i], mean[i], lv[i]).value);
  return load(value);
}

// A jump's term in nats, summed over the elements [first, first + count) of a sample.
float run_chunk(const VlbToAllArgs& a, const float* row, bool decoder, int64_t sample,
                int64_t first, int64_t count) {
  const auto at = [&](const Plane& p) {
    return static_cast<const float*>(p.data) + sample * p.sample + first;
  };
  const float *out = at(a.model_output), *x_0 = at(a.x_0), *x_t = at(a.x_t);
  const float* v = a.learned_variance ? out + a.count : nullptr;
  const vf x0_from_xt = splat(row[kX0FromXt]), x0_from_out = splat(row[kX0FromOut]);
  const vf mean_x0 = splat(row[kMeanX0]), mean_xt = splat(row[kMeanXt]);
  const vf bias = splat(row[kLogVarianceBias]), scale = splat(row[kLogVarianceScale]);
  const vf true_lv = splat(row[kPosteriorLogVariance]);
  const vf inverse_true = exp(-true_lv);

  vf total = splat(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    const vf xt = load_some(x_t + i, n), x0 = load_some(x_0 + i, n);
    const vf raw = x0_from_xt * xt + x0_from_out * load_some(out + i, n);
    const vf predicted = a.clip ? clamp(raw, -1.0f, 1.0f) : raw;
    const vf lv = v ? bias + scale * load_some(v + i, n) : bias;
    vf value;
    if (!decoder)
      value = kl_term(mean_x0 * (x0 - predicted), true_lv, inverse_true, lv).value;
    else if (a.exact)
      value = exact_decoder_values(x0, mean_x0 * predicted + mean_xt * xt, lv);
    else
      value = decoder_term(x0, mean_x0 * predicted + mean_xt * xt, lv).value;
    total += first_lanes(value, n);
  }
  return sum(total);
}

}  // namespace

// A term is computed by one thread, which adds its elements in order.
void vlb_to_all(const VlbToAllArgs& a, int num_threads) {
  const int64_t jobs = a.n * a.num_targets;
  // Half of the pairs of a batch are impossible jumps and take no time.
  for_uneven_jobs(jobs, num_threads, jobs * a.count < kSerialBelow, [&](int64_t job) {
    const float* row = a.rows + job * kNumColumns;
    const bool decoder = a.targets[job % a.num_targets] < 0;
    double nats = 0.0;
    if (row[kMeanX0] != row[kMeanX0]) nats = double(row[kMeanX0]);
    for (int64_t first = 0; first < a.count && nats == nats; first += kTile * kLanes) {
      const int64_t left = a.count - first;
      nats += run_chunk(a, row, decoder, job / a.num_targets, first,
                        left < kTile * kLanes ? left : kTile * kLanes);
    }
    a.terms[job] = float(nats / double(a.count) * kInverseLn2);
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
