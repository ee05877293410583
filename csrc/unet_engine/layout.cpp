// Copies between the caller's NCHW tensors and the plan's NHWC buffers.
#if defined(__AVX2__)
#include "unet_engine/plan.h"

namespace iddpm {
namespace IDDPM_ISA {

int run_input(const InputOp& op, const PlanRun& run, const Team& team) {
  const Range pixels = share(team.n * op.pixels, 64, team.thread, team.threads);
  for (int64_t i = pixels.begin; i < pixels.end; ++i) {
    const int64_t sample = i / op.pixels, pixel = i % op.pixels;
    const float* x = run.input + sample * op.channels * op.pixels + pixel;
    for (int64_t c = 0; c < op.channels; ++c) op.out[i * op.out_stride + c] = x[c * op.pixels];
  }
  return 0;
}

int run_output(const OutputOp& op, const PlanRun& run, const Team& team) {
  const Range pixels = share(team.n * op.pixels, 64, team.thread, team.threads);
  for (int64_t i = pixels.begin; i < pixels.end; ++i) {
    const int64_t sample = i / op.pixels, pixel = i % op.pixels;
    float* x = run.output + sample * op.channels * op.pixels + pixel;
    for (int64_t c = 0; c < op.channels; ++c) x[c * op.pixels] = op.in[i * op.in_stride + c];
  }
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
