#include "reverse_step/reverse_step.h"

#include "common/columns.h"
#include "common/philox_simd.h"
#include "common/tile.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

// Elements that one thread takes at a time: large enough to hide the hand-over, a multiple of the
// tile.
constexpr int64_t kChunk = 64 * kNormalsTile;

struct Coefficients {
  float x0_from_xt, x0_from_out, mean_x0, mean_xt, bias, scale, noise_scale;
};

Coefficients coefficients(const ReverseStepArgs& a, int64_t sample) {
  const int64_t t = a.t[sample];
  const float nan = __builtin_nanf("");
  if (t < 0 || t >= a.num_timesteps) return {nan, nan, nan, nan, nan, nan, nan};
  const float* row = a.table + t * kNumColumns;
  return {row[kX0FromXt],        row[kX0FromOut],        row[kMeanX0],    row[kMeanXt],
          row[kLogVarianceBias], row[kLogVarianceScale], row[kNoiseScale]};
}

void run_tile(const ReverseStepArgs& a, const Coefficients& k, int64_t sample, int64_t first,
              int64_t count) {
  float x_space[kNormalsTile], out_space[kNormalsTile], v_space[kNormalsTile];
  float z_space[kNormalsTile], prev_space[kNormalsTile], x_0_space[kNormalsTile];
  const int64_t all = a.c * a.hw;
  const bool drawn = a.key.samples != nullptr;
  const bool noisy = (drawn || a.noise.data) && k.noise_scale != 0.0f;

  const float* x = read_tile(a.x_t, DType::kFloat32, a.hw, sample, first, count, x_space);
  const float* out =
      read_tile(a.model_output, a.output_dtype, a.hw, sample, first, count, out_space);
  const float* v = nullptr;
  const float* z = z_space;
  if (noisy && a.learned_variance)
    v = read_tile(a.model_output, a.output_dtype, a.hw, sample, all + first, count, v_space);
  if (noisy && drawn)
    normals_tile(a.key.seed, uint32_t(first / 4), uint32_t(a.key.samples[sample]),
                 uint32_t(a.key.steps[sample]), a.key.stream_draw, z_space);
  else if (noisy)
    z = read_tile(a.noise, DType::kFloat32, a.hw, sample, first, count, z_space);

  float* prev = write_target(a.x_prev, a.hw, sample, first, count, prev_space);
  float* x_0 = write_target(a.x_0, a.hw, sample, first, count, x_0_space);
  const vf fixed_deviation = splat(k.noise_scale) * exp(splat(0.5f * k.bias));
  for (int64_t i = 0; i < kNormalsTile; i += kLanes) {
    const vf xi = load(x + i);
    vf x_0i = k.x0_from_xt * xi + k.x0_from_out * load(out + i);
    if (a.clip) x_0i = clamp(x_0i, -1.0f, 1.0f);
    vf previous = k.mean_x0 * x_0i + k.mean_xt * xi;
    if (noisy) {
      const vf deviation =
          v ? k.noise_scale * exp(0.5f * (k.bias + k.scale * load(v + i))) : fixed_deviation;
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
  const int64_t chunks = (all + kChunk - 1) / kChunk;
  const bool parallel = num_threads > 1 && args.n * all >= kSerialBelow;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (parallel)
  for (int64_t job = 0; job < args.n * chunks; ++job) {
    const int64_t sample = job / chunks, start = (job % chunks) * kChunk;
    const int64_t end = start + kChunk < all ? start + kChunk : all;
    const Coefficients k = coefficients(args, sample);
    for (int64_t first = start; first < end; first += kNormalsTile)
      run_tile(args, k, sample, first, end - first < kNormalsTile ? end - first : kNormalsTile);
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
