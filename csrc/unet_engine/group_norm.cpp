// GroupNorm into float32 buffers.
#if defined(__AVX2__)
#include "unet_engine/group_norm.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

template <bool Silu>
void apply(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t pixels,
           int64_t channels, const float* slope, const float* offset) {
  for (int64_t p = 0; p < pixels; ++p, x += x_stride, y += y_stride) {
    for (int64_t c = 0; c < channels; c += kWidth) {
      const nv v = load<nv>(x + c) * load<nv>(slope + c) + load<nv>(offset + c);
      store(y + c, Silu ? silu(v) : v);
    }
  }
}

}  // namespace

int run_group_norm(const GroupNormOp& op, const PlanRun& run, const Team& team) {
  const Normalization& of = op.of;
  if (fold_statistics(of, run, team)) return 1;
  Range rows = share(team.n * of.pixels, 4, team.thread, team.threads);
  while (rows.begin < rows.end) {
    const int64_t sample = rows.begin / of.pixels;
    const int64_t end = smaller(rows.end, (sample + 1) * of.pixels);
    const float* a = slope_of(of, team, sample);
    (of.silu ? apply<true> : apply<false>)(of.in + rows.begin * of.in_stride, of.in_stride,
                                           op.out + rows.begin * op.out_stride, op.out_stride,
                                           end - rows.begin, of.channels, a, a + of.channels);
    rows.begin = end;
  }
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
