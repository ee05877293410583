#include "vlb_terms/vlb_terms.h"

#include "common/gaussian.h"
#include "common/gaussian_exact.h"
#include "common/threads.h"
#include "common/tile.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

Term exact_decoder_terms(vf x, vf mean, vf lv) {
  float value[kLanes], d_mean[kLanes], d_lv[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const ExactTerm term = exact_decoder_term(x[i], mean[i], lv[i]);
    value[i] = float(term.value), d_mean[i] = float(term.d_mean), d_lv[i] = float(term.d_lv);
  }
  return {load(value), load(d_mean), load(d_lv)};
}

// Quantities shared by the elements of one sample.
struct Sample {
  vf x0_from_xt, x0_from_out, mean_x0, mean_xt, bias, scale, true_lv, inverse_true;
  vf out_weight, v_weight;
  bool last;
  int64_t number;

  Sample(const VlbTermsArgs& a, int64_t n) : last(a.t[n] == 0), number(n) {
    const float* row = table_row(a.table, a.t[n], a.num_timesteps);
    x0_from_xt = splat(row[kX0FromXt]), x0_from_out = splat(row[kX0FromOut]);
    mean_x0 = splat(row[kMeanX0]), mean_xt = splat(row[kMeanXt]);
    bias = splat(row[kLogVarianceBias]), scale = splat(row[kLogVarianceScale]);
    true_lv = splat(row[kPosteriorLogVariance]);
    inverse_true = exp(-true_lv);
    const float weight = float(kInverseLn2) / float(a.c * a.hw);
    out_weight = mean_x0 * x0_from_out * weight, v_weight = scale * weight;
  }
};

// The terms of a tile in nats, added lane by lane; writes its gradients, in bits per dimension.
vf run_tile(const VlbTermsArgs& a, const Sample& s, int64_t first, int64_t count) {
  float out_space[kTile], v_space[kTile], x_0_space[kTile], x_t_space[kTile];
  float d_out_space[kTile], d_v_space[kTile];
  const int64_t all = a.c * a.hw, n = s.number;
  const float* out = read_tile(a.model_output, a.output_dtype, a.hw, n, first, count, out_space);
  const float* x_0 = read_tile(a.x_0, DType::kFloat32, a.hw, n, first, count, x_0_space);
  const float* x_t = read_tile(a.x_t, DType::kFloat32, a.hw, n, first, count, x_t_space);
  const float* v = nullptr;
  if (a.learned_variance)
    v = read_tile(a.model_output, a.output_dtype, a.hw, n, all + first, count, v_space);
  const auto target = [&](int64_t from, float* space) {
    if (!a.gradient.data) return space;
    return write_target(a.gradient, a.output_dtype, a.hw, n, from, count, space);
  };
  float* d_out = target(first, d_out_space);
  float* d_v = v ? target(all + first, d_v_space) : d_v_space;

  vf total = splat(0.0f);
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const vf xt = load(x_t + i), x0 = load(x_0 + i);
    const vf raw = s.x0_from_xt * xt + s.x0_from_out * load(out + i);
    const vf predicted = a.clip ? clamp(raw, -1.0f, 1.0f) : raw;
    const vf lv = v ? s.bias + s.scale * load(v + i) : s.bias;
    Term term;
    if (!s.last)
      term = kl_term(s.mean_x0 * (x0 - predicted), s.true_lv, s.inverse_true, lv);
    else if (a.exact)
      term = exact_decoder_terms(x0, s.mean_x0 * predicted + s.mean_xt * xt, lv);
    else
      term = decoder_term(x0, s.mean_x0 * predicted + s.mean_xt * xt, lv);
    total += first_lanes(term.value, count - i);
    const vf through = term.d_mean * s.out_weight;
    const vi inside = (raw >= splat(-1.0f)) & (raw <= splat(1.0f));
    store(d_out + i, a.clip ? select(inside, through, splat(0.0f)) : through);
    store(d_v + i, term.d_log_variance * s.v_weight);
  }
  if (a.gradient.data) {
    write_tile(a.gradient, a.output_dtype, a.hw, n, first, count, d_out);
    if (v) write_tile(a.gradient, a.output_dtype, a.hw, n, all + first, count, d_v);
  }
  return total;
}

}  // namespace

// A sample belongs to one thread and its tiles are added in order, so that neither the number of
// threads nor the batch changes a bit.
void vlb_terms(const VlbTermsArgs& a, int num_threads) {
  const int64_t all = a.c * a.hw;
  for_jobs(a.n, num_threads, a.n * all < kSerialBelow, [&](int64_t sample) {
    const Sample shared(a, sample);
    double nats = 0.0;
    for (int64_t chunk = 0; chunk < all; chunk += kChunk) {
      const int64_t end = chunk + kChunk < all ? chunk + kChunk : all;
      vf total = splat(0.0f);
      for (int64_t first = chunk; first < end; first += kTile)
        total += run_tile(a, shared, first, end - first < kTile ? end - first : kTile);
      nats += sum(total);
    }
    a.terms[sample] = float(nats / double(all) * kInverseLn2);
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
