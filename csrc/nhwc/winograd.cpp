// 3 x 3 convolutions by Winograd's minimal filtering, Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016: y = A^T [(G g G^T) . (B^T d B)] A over tiles of m x m
// outputs.
//
// A block of tiles is transformed into scratch, v [(m + 2)^2][tiles][C]; then, for each panel of 32
// output channels, (m + 2)^2 matrix products give u [(m + 2)^2][tiles][32], whose inverse transform
// adds bias and residual. If there are few tiles, the team transforms all of them together and
// divides the panels instead.
#if defined(__AVX2__)
#include "nhwc/winograd.h"

#include "nhwc/panel.h"
#include "nhwc/winograd_tiles.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

// The products and the inverse transforms of `count` tiles from `tile` on, for a range of panels.
template <int M, class T>
void multiply_tiles(const WinogradConv<T>& op, const Grid& grid, int64_t tile, int64_t count,
                    const float* v, float* u, Range panels) {
  constexpr int64_t E = (M + 2) * (M + 2);
  const int64_t pitch = op.channels + kRowPad;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t first = panel * kPanel;
    const int64_t columns = smaller(kPanel, op.columns - first);
    const float* w = op.w + panel * E * op.channels * kPanel;
    for (int64_t e = 0; e < E; ++e)
      multiply_panel(count, columns, op.channels, v + e * count * pitch, pitch,
                     w + e * op.channels * kPanel, kPanel, u + e * count * kPanel, kPanel,
                     Addends{});
    for (int64_t t = 0; t < count; ++t)
      transform_output<M>(op, grid, tile + t, u + t * kPanel, count * kPanel, first, columns);
  }
}

template <int M, class T>
int run(const WinogradConv<T>& op, const Team& team) {
  constexpr int64_t E = (M + 2) * (M + 2);
  const Grid grid = grid_of(op.height, op.width, M, team.n);
  const int64_t pitch = op.channels + kRowPad;
  const int64_t panels = divide_up(op.columns, kPanel);
  if (op.channels > kWinogradChannels) return 1;
  if (team.threads > 1 && grid.count < few_tiles(kTileRows) * team.threads) {
    if (E * grid.count * pitch > team.shared_floats) return 1;
    if (E * grid.count * kPanel > team.scratch_floats) return 1;
    const Range mine = share(grid.count, 1, team.thread, team.threads);
    for (int64_t t = mine.begin; t < mine.end; ++t)
      transform_input<M>(op, grid, t, team.shared + t * pitch, grid.count * pitch);
    barrier(team);
    multiply_tiles<M>(op, grid, 0, grid.count, team.shared, team.scratch,
                      share(panels, 1, team.thread, team.threads));
    return 0;
  }
  const int64_t fit = smaller(op.block, grid.count);
  if (E * fit * (pitch + kPanel) > team.scratch_floats) return 1;
  const Range mine = share(grid.count, 1, team.thread, team.threads);
  const int64_t total = mine.end - mine.begin;
  const int64_t blocks = divide_up(total, fit);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = mine.begin + total * block / blocks;
    const int64_t count = mine.begin + total * (block + 1) / blocks - begin;
    float* v = team.scratch;
    for (int64_t t = 0; t < count; ++t)
      transform_input<M>(op, grid, begin + t, v + t * pitch, count * pitch);
    multiply_tiles<M>(op, grid, begin, count, v, v + E * count * pitch, Range{0, panels});
  }
  return 0;
}

}  // namespace

int run_winograd(const WinogradOp& op, const Team& team) {
  return op.tile == 4 ? run<4>(op, team) : run<2>(op, team);
}

int run_winograd(const WinogradConv<BFloat16>& op, const Team& team) {
  return op.tile == 4 ? run<4>(op, team) : run<2>(op, team);
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
