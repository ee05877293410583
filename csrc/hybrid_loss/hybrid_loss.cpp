#include "hybrid_loss/hybrid_loss.h"

#include "common/gaussian.h"
#include "common/noise_tile.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

struct Sums {
  double square, nats;
};

Sums run_tile(const HybridLossArgs& a, const float* row, int64_t sample, int64_t first,
              int64_t count) {
  float out_space[kTile], v_space[kTile], x_0_space[kTile], x_t_space[kTile], z_space[kTile];
  const int64_t all = a.c * a.hw;
  const float* out =
      read_tile(a.model_output, a.output_dtype, a.hw, sample, first, count, out_space);
  const float* v =
      read_tile(a.model_output, a.output_dtype, a.hw, sample, all + first, count, v_space);
  const float* x_0 = read_tile(a.x_0, DType::kFloat32, a.hw, sample, first, count, x_0_space);
  const float* x_t = read_tile(a.x_t, DType::kFloat32, a.hw, sample, first, count, x_t_space);
  const float* z = noise_tile(a.noise, a.key, a.hw, sample, first, count, z_space);

  const vf x0_from_xt = splat(row[kX0FromXt]), x0_from_out = splat(row[kX0FromOut]);
  const vf mean_x0 = splat(row[kMeanX0]), mean_xt = splat(row[kMeanXt]);
  const vf bias = splat(row[kLogVarianceBias]), scale = splat(row[kLogVarianceScale]);
  const vf true_lv = splat(row[kPosteriorLogVariance]);
  const vf inverse_true = exp(-true_lv);
  const vf from_x_0 = splat(row[kTargetX0]), from_x_t = splat(row[kTargetXt]);
  const vf from_noise = splat(row[kTargetNoise]);
  const vf out_weight = splat(2.0f / float(all)),
           v_weight = scale * (float(kInverseLn2) / float(all));
  const bool last = a.t[sample] == 0;

  float d_out[kTile], d_v[kTile];
  vf squares = splat(0.0f), nats = splat(0.0f);
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const vf x0 = load(x_0 + i), xt = load(x_t + i), predicted = load(out + i);
    const vf error = predicted - (from_x_0 * x0 + from_x_t * xt + from_noise * load(z + i));
    const vf x0_predicted = x0_from_xt * xt + x0_from_out * predicted;
    const vf lv = bias + scale * load(v + i);
    const Term term = last ? decoder_term(x0, mean_x0 * x0_predicted + mean_xt * xt, lv)
                           : kl_term(mean_x0 * (x0 - x0_predicted), true_lv, inverse_true, lv);
    squares += first_lanes(error * error, count - i);
    nats += first_lanes(term.value, count - i);
    store(d_out + i, out_weight * error);
    store(d_v + i, v_weight * term.d_log_variance);
  }
  if (a.gradient.data) {
    write_tile(a.gradient, a.output_dtype, a.hw, sample, first, count, d_out);
    write_tile(a.gradient, a.output_dtype, a.hw, sample, all + first, count, d_v);
  }
  return {sum(squares), sum(nats)};
}

}  // namespace

// A sample belongs to one thread and its tiles are added in order, so that neither the number of
// threads nor the batch changes a bit.
void hybrid_loss(const HybridLossArgs& a, int num_threads) {
  const int64_t all = a.c * a.hw;
  const bool parallel = num_threads > 1 && a.n * all >= kSerialBelow;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (parallel)
  for (int64_t sample = 0; sample < a.n; ++sample) {
    const float* row = table_row(a.table, a.t[sample], a.num_timesteps);
    double square = 0.0, nats = 0.0;
    for (int64_t first = 0; first < all; first += kTile) {
      const Sums sums = run_tile(a, row, sample, first, all - first < kTile ? all - first : kTile);
      square += sums.square;
      nats += sums.nats;
    }
    a.mse[sample] = float(square / double(all));
    a.vlb[sample] = float(nats / double(all) * kInverseLn2);
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
