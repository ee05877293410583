// Linear layers and 1 x 1 convolutions with packed weights; bias and residual are added when a tile
// is stored.
#if defined(__AVX2__)
#include "nhwc/gemm.h"

#include "nhwc/panel.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

// Floats of a block of rows of a, which stay in the L2 cache while the panels are streamed.
constexpr int64_t kBlockFloats = 64 * 1024;

void multiply(const GemmOp& op, Range rows, Range panels) {
  int64_t block = kBlockFloats / op.depth / kTileRows * kTileRows;
  block = larger(block, kTileRows);
  for (int64_t row = rows.begin; row < rows.end; row += block) {
    const int64_t count = smaller(block, rows.end - row);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t column = panel * kPanel;
      Addends add{op.bias ? op.bias + column : nullptr,
                  op.residual ? op.residual + row * op.residual_stride + column : nullptr,
                  op.residual_stride};
      multiply_panel(count, smaller(kPanel, op.columns - column), op.depth,
                     op.a + row * op.a_stride, op.a_stride, op.w + column * op.depth, kPanel,
                     op.out + row * op.out_stride + column, op.out_stride, add);
    }
  }
}

}  // namespace

int run_gemm(const GemmOp& op, const Team& team) {
  const int64_t rows = op.rows * team.n;
  const int64_t panels = divide_up(op.columns, kPanel);
  if (rows >= 2 * kTileRows * team.threads)
    multiply(op, share(rows, kTileRows, team.thread, team.threads), Range{0, panels});
  else
    multiply(op, Range{0, rows}, share(panels, 1, team.thread, team.threads));
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
