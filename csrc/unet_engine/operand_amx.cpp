// Writes the operand images of the tile products: normalised, or as they are.
#include "common/simd_coarse.h"
#include "nhwc/amx_tile.h"
#include "unet_engine/group_norm.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

// One row of pixels.
template <bool Silu>
void normalise(const Normalization& of, const float* x, const float* slope, int64_t width,
               BFloat16* out, int64_t pitch) {
  for (int64_t i = 0; i < width; ++i, x += of.in_stride, out += pitch) {
    for (int64_t c = 0; c < of.channels; c += 2 * kWidth) {
      nv v[2];
      IDDPM_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int64_t k = c + j * kWidth;
        v[j] = load<nv>(x + k) * load<nv>(slope + k) + load<nv>(slope + of.channels + k);
        if (Silu) v[j] = silu_coarse(v[j]);
      }
      store_both(out + c, v[0], v[1]);
    }
  }
}

}  // namespace

int run_norm_operand(const NormOperandOp& op, const PlanRun& run, const Team& team) {
  const Normalization& of = op.of;
  const OperandMap& map = *op.map;
  if (fold_statistics(of, run, team)) return 1;
  const OperandWriter writer(map, op.out, of.channels);
  const Range rows = share(team.n * map.height, 1, team.thread, team.threads);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t sample = row / map.height, y = row % map.height;
    (of.silu ? normalise<true> : normalise<false>)(of, of.in + row * map.width * of.in_stride,
                                                   slope_of(of, team, sample), map.width,
                                                   writer.row(sample, y), map.pitch);
    writer.finish(sample, y);
  }
  return 0;
}

int run_round(const RoundOp& op, const Team& team) {
  const OperandMap& map = *op.map;
  const int64_t phases = op.phase ? 4 : 1, step = op.phase ? 2 : 1;
  const Range rows = share(team.n * phases * map.height, 1, team.thread, team.threads);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t y = row % map.height, phase = row / map.height % phases;
    const int64_t sample = row / (map.height * phases);
    const int64_t source_y = y * step + phase / 2, source_x = phase % 2;
    const OperandWriter writer(map, op.out + phase * op.phase, op.channels);
    BFloat16* out = writer.row(sample, y);
    for (int64_t x = 0; x < map.width; ++x, out += map.pitch) {
      const int64_t at = x * step + source_x;
      if (source_y >= op.height || at >= op.width) {
        std::memset(out, 0, size_t(op.channels) * sizeof(BFloat16));
        continue;
      }
      const float* in = op.in + ((sample * op.height + source_y) * op.width + at) * op.in_stride;
      for (int64_t c = 0; c < op.channels; c += kWidth) {
        const nv v = load<nv>(in + c);
        store(out + c, v);
        if (op.rest) store(out + op.rest + c, v - load<nv>(out + c));
      }
    }
    writer.finish(sample, y);
  }
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
