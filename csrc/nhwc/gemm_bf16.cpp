// Linear layers and 1 x 1 convolutions of bfloat16 operands: a block of rows is rounded into
// scratch, then multiplied like in gemm.cpp at twice its rate; sums, bias and residual are float32.
#if defined(__AVX512BF16__)
#include "nhwc/gemm.h"
#include "nhwc/panel.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

int multiply(const GemmOp& op, Range rows, Range panels, const Team& team) {
  const BFloat16* w = reinterpret_cast<const BFloat16*>(op.w);
  BFloat16* a = reinterpret_cast<BFloat16*>(team.scratch);
  const int64_t pitch = op.depth + kRoundedPad;
  const int64_t most = rounded_rows(rows.end - rows.begin, op.depth);
  if (team.scratch_floats < gemm_bf16_scratch(rows.end - rows.begin, op.depth)) return 1;
  for (int64_t row = rows.begin; row < rows.end; row += most) {
    const int64_t count = smaller(most, rows.end - row);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < op.depth; k += kWidth)
        store(a + i * pitch + k, load<nv>(op.a + (row + i) * op.a_stride + k));
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t column = panel * kPanel;
      Addends add{op.bias ? op.bias + column : nullptr,
                  op.residual ? op.residual + row * op.residual_stride + column : nullptr,
                  op.residual_stride};
      multiply_panel(count, smaller(kPanel, op.columns - column), op.depth, a, pitch,
                     w + column * op.depth, kPanel, op.out + row * op.out_stride + column,
                     op.out_stride, add);
    }
  }
  return 0;
}

}  // namespace

int run_gemm_bf16(const GemmOp& op, const Team& team) {
  const int64_t rows = op.rows * team.n;
  const int64_t panels = divide_up(op.columns, kPanel);
  if (rows >= 2 * kTileRows * team.threads)
    return multiply(op, share(rows, kTileRows, team.thread, team.threads), Range{0, panels}, team);
  return multiply(op, Range{0, rows}, share(panels, 1, team.thread, team.threads), team);
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
