#include "reverse_step/reverse_step.h"

#include "common/noise_tile.h"
#include "common/threads.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

void run_tile(const ReverseStepArgs& a, const float* row, int64_t sample, int64_t first,
              int64_t count) {
  float x_space[kTile], out_space[kTile], v_space[kTile];
  float z_space[kTile], prev_space[kTile], x_0_space[kTile];
  const bool noisy = (a.key.samples || a.noise.data) && row[kNoiseScale] != 0.0f;

  const float* x = read_tile(a.x_t, DType::kFloat32, a.hw, sample, first, count, x_space);
  const float* out =
      read_tile(a.model_output, a.output_dtype, a.hw, sample, first, count, out_space);
  const float* v = nullptr;
  const float* z = nullptr;
  if (noisy) z = noise_tile(a.noise, a.key, a.hw, sample, first, count, z_space);
  if (noisy && a.learned_variance)
    v = read_tile(a.model_output, a.output_dtype, a.hw, sample, a.c * a.hw + first, count, v_space);
  float* prev = write_target(a.x_prev, a.hw, sample, first, count, prev_space);
  float* x_0 = write_target(a.x_0, a.hw, sample, first, count, x_0_space);

  const vf x0_from_xt = splat(row[kX0FromXt]), x0_from_out = splat(row[kX0FromOut]);
  const vf mean_x0 = splat(row[kMeanX0]), mean_xt = splat(row[kMeanXt]);
  const vf noise_scale = splat(row[kNoiseScale]);
  const vf half_bias = splat(0.5f * row[kLogVarianceBias]);
  const vf half_scale = splat(0.5f * row[kLogVarianceScale]);
  const vf fixed_deviation = noise_scale * exp(half_bias);
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const vf xi = load(x + i);
    vf x_0i = x0_from_xt * xi + x0_from_out * load(out + i);
    if (a.clip) x_0i = clamp(x_0i, -1.0f, 1.0f);
    vf previous = mean_x0 * x_0i + mean_xt * xi;
    if (noisy) {
      const vf deviation =
          v ? noise_scale * exp(half_bias + half_scale * load(v + i)) : fixed_deviation;
      previous += deviation * load(z + i);
    }
    store(x_0 + i, x_0i);
    store(prev + i, previous);
  }
  write_back(a.x_prev, a.hw, sample, first, count, prev, prev_space);
  write_back(a.x_0, a.hw, sample, first, count, x_0, x_0_space);
}

}  // namespace

void reverse_step(const ReverseStepArgs& args, int num_threads) {
  const int64_t all = args.c * args.hw;
  const int64_t chunks = divide_up(all, kChunk);
  for_jobs(args.n * chunks, num_threads, args.n * all < kSerialBelow, [&](int64_t job) {
    const int64_t sample = job / chunks, start = (job % chunks) * kChunk;
    const int64_t end = start + kChunk < all ? start + kChunk : all;
    const float* row = table_row(args.table, args.t[sample], args.num_timesteps);
    for (int64_t first = start; first < end; first += kTile)
      run_tile(args, row, sample, first, end - first < kTile ? end - first : kTile);
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
