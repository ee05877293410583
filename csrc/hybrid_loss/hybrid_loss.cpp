#include "hybrid_loss/hybrid_loss.h"

#include "common/gaussian.h"
#include "common/noise_tile.h"
#include "common/threads.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

struct Sums {
  vf squares = splat(0.0f), nats = splat(0.0f);
};

// Quantities shared by the elements of one sample.
struct Sample {
  vf x0_from_xt, x0_from_out, mean_x0, mean_xt, bias, scale, true_lv, inverse_true;
  vf from_x_0, from_x_t, from_noise, out_weight, v_weight;
  bool last;
  int64_t number;

  Sample(const HybridLossArgs& a, int64_t n) : last(a.t[n] == 0), number(n) {
    const float* row = table_row(a.table, a.t[n], a.num_timesteps);
    x0_from_xt = splat(row[kX0FromXt]), x0_from_out = splat(row[kX0FromOut]);
    mean_x0 = splat(row[kMeanX0]), mean_xt = splat(row[kMeanXt]);
    bias = splat(row[kLogVarianceBias]), scale = splat(row[kLogVarianceScale]);
    true_lv = splat(row[kPosteriorLogVariance]);
    inverse_true = exp(-true_lv);
    from_x_0 = splat(row[kTargetX0]), from_x_t = splat(row[kTargetXt]);
    from_noise = splat(row[kTargetNoise]);
    const float all = float(a.c * a.hw);
    out_weight = splat(2.0f / all), v_weight = scale * (float(kInverseLn2) / all);
  }
};

// Adds a tile's terms to the sums, lane by lane, and writes its gradients.
void run_tile(const HybridLossArgs& a, const Sample& s, int64_t first, int64_t count, Sums* sums) {
  float out_space[kTile], v_space[kTile], x_0_space[kTile], x_t_space[kTile], z_space[kTile];
  float d_out_space[kTile], d_v_space[kTile];
  const int64_t all = a.c * a.hw, n = s.number;
  const float* out = read_tile(a.model_output, a.output_dtype, a.hw, n, first, count, out_space);
  const float* v = read_tile(a.model_output, a.output_dtype, a.hw, n, all + first, count, v_space);
  const float* x_0 = read_tile(a.x_0, DType::kFloat32, a.hw, n, first, count, x_0_space);
  const float* x_t = read_tile(a.x_t, DType::kFloat32, a.hw, n, first, count, x_t_space);
  const float* z = noise_tile(a.noise, a.key, a.hw, n, first, count, z_space);
  const auto target = [&](int64_t from, float* space) {
    if (!a.gradient.data) return space;
    return write_target(a.gradient, a.output_dtype, a.hw, n, from, count, space);
  };
  float* d_out = target(first, d_out_space);
  float* d_v = target(all + first, d_v_space);

  for (int64_t i = 0; i < kTile; i += kLanes) {
    const vf x0 = load(x_0 + i), xt = load(x_t + i), predicted = load(out + i);
    const vf error = predicted - (s.from_x_0 * x0 + s.from_x_t * xt + s.from_noise * load(z + i));
    const vf x0_predicted = s.x0_from_xt * xt + s.x0_from_out * predicted;
    const vf lv = s.bias + s.scale * load(v + i);
    const Term term = s.last
                          ? decoder_term(x0, s.mean_x0 * x0_predicted + s.mean_xt * xt, lv)
                          : kl_term(s.mean_x0 * (x0 - x0_predicted), s.true_lv, s.inverse_true, lv);
    sums->squares += first_lanes(error * error, count - i);
    sums->nats += first_lanes(term.value, count - i);
    store(d_out + i, s.out_weight * error);
    store(d_v + i, s.v_weight * term.d_log_variance);
  }
  if (a.gradient.data) {
    write_tile(a.gradient, a.output_dtype, a.hw, n, first, count, d_out);
    write_tile(a.gradient, a.output_dtype, a.hw, n, all + first, count, d_v);
  }
}

}  // namespace

// A sample belongs to one thread and its tiles are added in order, so that neither the number of
// threads nor the batch changes a bit.
void hybrid_loss(const HybridLossArgs& a, int num_threads) {
  const int64_t all = a.c * a.hw;
  for_jobs(a.n, num_threads, a.n * all < kSerialBelow, [&](int64_t sample) {
    const Sample shared(a, sample);
    double square = 0.0, nats = 0.0;
    for (int64_t chunk = 0; chunk < all; chunk += kChunk) {
      const int64_t end = chunk + kChunk < all ? chunk + kChunk : all;
      Sums sums;
      for (int64_t first = chunk; first < end; first += kTile)
        run_tile(a, shared, first, end - first < kTile ? end - first : kTile, &sums);
      square += sum(sums.squares);
      nats += sum(sums.nats);
    }
    a.mse[sample] = float(square / double(all));
    a.vlb[sample] = float(nats / double(all) * kInverseLn2);
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
