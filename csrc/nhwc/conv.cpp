// Convolutions that Winograd does not support (stride 2, the first layer), by im2col: the nine
// neighbours of a block of pixels are gathered into scratch and multiplied by the packed weights.
#if defined(__AVX2__)
#include "nhwc/conv.h"

#include "nhwc/panel.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

void gather(const ConvOp& op, int64_t pixel, int64_t out_height, int64_t out_width, float* row) {
  const int64_t x = pixel % out_width, y = pixel / out_width % out_height;
  const int64_t sample = pixel / (out_width * out_height);
  const float* image = op.in + sample * op.height * op.width * op.in_stride;
  const int64_t height = op.height << op.upscale, width = op.width << op.upscale;
  for (int64_t dy = -1; dy <= 1; ++dy) {
    for (int64_t dx = -1; dx <= 1; ++dx, row += op.channels) {
      const int64_t sy = y * op.stride + dy, sx = x * op.stride + dx;
      if (sy < 0 || sy >= height || sx < 0 || sx >= width) {
        std::memset(row, 0, size_t(op.channels) * sizeof(float));
      } else {
        const int64_t source = (sy >> op.upscale) * op.width + (sx >> op.upscale);
        std::memcpy(row, image + source * op.in_stride, size_t(op.channels) * sizeof(float));
      }
    }
  }
}

}  // namespace

int run_conv(const ConvOp& op, const Team& team) {
  const int64_t out_height = divide_up(op.height << op.upscale, op.stride);
  const int64_t out_width = divide_up(op.width << op.upscale, op.stride);
  const int64_t pixels = out_height * out_width * team.n, depth = 9 * op.channels;
  const int64_t panels = divide_up(op.columns, kPanel);
  const bool by_rows = pixels >= 2 * kTileRows * team.threads;
  const Range rows =
      by_rows ? share(pixels, kTileRows, team.thread, team.threads) : Range{0, pixels};
  const Range columns = by_rows ? Range{0, panels} : share(panels, 1, team.thread, team.threads);
  const int64_t pitch = depth + kGatheredPad;
  const int64_t block = conv_block(rows.end - rows.begin, op.channels);
  if (block * pitch > team.scratch_floats) return 1;
  for (int64_t row = rows.begin; row < rows.end; row += block) {
    const int64_t count = smaller(block, rows.end - row);
    for (int64_t i = 0; i < count; ++i)
      gather(op, row + i, out_height, out_width, team.scratch + i * pitch);
    for (int64_t panel = columns.begin; panel < columns.end; ++panel) {
      const int64_t column = panel * kPanel;
      Addends add{op.bias ? op.bias + column : nullptr,
                  op.residual ? op.residual + row * op.residual_stride + column : nullptr,
                  op.residual_stride};
      multiply_panel(count, smaller(kPanel, op.columns - column), depth, team.scratch, pitch,
                     op.w + column * depth, kPanel, op.out + row * op.out_stride + column,
                     op.out_stride, add);
    }
  }
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
