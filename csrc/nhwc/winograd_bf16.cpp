// Winograd's F(2x2, 3x3) with the transformed input and weights rounded to bfloat16; transforms and
// sums are float32.
//
// v is [groups][16][tiles of the group][C]. A panel's products of one group, u [16][tiles][32],
// stay in L1 until the inverse transform, so that only the weights, half the size of float32's, are
// streamed. F(4x4) is not supported: its error would be three times as large.
#if defined(__AVX512BF16__)
#include "nhwc/panel.h"
#include "nhwc/winograd_tiles.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

constexpr int M = 2;
constexpr int64_t kElements = 16;

int64_t groups_of(int64_t tiles) { return divide_up(tiles, kTileRows); }

// Tiles [begin, end) of a group of [0, tiles).
Range group_range(int64_t tiles, int64_t group) {
  const int64_t groups = groups_of(tiles);
  return Range{tiles * group / groups, tiles * (group + 1) / groups};
}

void transform_group(const WinogradOp& op, const Grid& grid, int64_t first, Range group,
                     BFloat16* v) {
  const int64_t count = group.end - group.begin;
  v += group.begin * kElements * op.channels;
  for (int64_t t = 0; t < count; ++t)
    transform_input<M>(op, grid, first + group.begin + t, v + t * op.channels, count * op.channels);
}

// The products and the inverse transforms of `tiles` tiles from `first` on, for a range of panels.
void multiply_tiles(const WinogradOp& op, const Grid& grid, int64_t first, int64_t tiles,
                    const BFloat16* v, Range panels) {
  alignas(64) float u[kElements * kTileRows * kPanel];
  const int64_t element = op.channels * kPanel;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t column = panel * kPanel, columns = smaller(kPanel, op.columns - column);
    const BFloat16* w = reinterpret_cast<const BFloat16*>(op.w) + panel * kElements * element;
    for (int64_t group = 0; group < groups_of(tiles); ++group) {
      const Range range = group_range(tiles, group);
      const int64_t count = range.end - range.begin;
      const BFloat16* rows = v + range.begin * kElements * op.channels;
      for (int64_t e = 0; e < kElements; ++e)
        multiply_panel(count, columns, op.channels, rows + e * count * op.channels, op.channels,
                       w + e * element, kPanel, u + e * count * kPanel, kPanel, Addends{});
      for (int64_t t = 0; t < count; ++t)
        transform_output<M>(op, grid, first + range.begin + t, u + t * kPanel, count * kPanel,
                            column, columns);
    }
  }
}

}  // namespace

int run_winograd_bf16(const WinogradOp& op, const Team& team) {
  const Grid grid = grid_of(op.height, op.width, M, team.n);
  const int64_t panels = divide_up(op.columns, kPanel);
  const int64_t tile_halves = kElements * op.channels;
  if (op.tile != M || op.channels > kWinogradChannels) return 1;
  if (team.threads > 1 && grid.count < few_tiles(kTileRows) * team.threads) {
    if (grid.count * tile_halves > 2 * team.shared_floats) return 1;
    BFloat16* v = reinterpret_cast<BFloat16*>(team.shared);
    const Range mine = share(groups_of(grid.count), 1, team.thread, team.threads);
    for (int64_t group = mine.begin; group < mine.end; ++group)
      transform_group(op, grid, 0, group_range(grid.count, group), v);
    barrier(team);
    multiply_tiles(op, grid, 0, grid.count, v, share(panels, 1, team.thread, team.threads));
    return 0;
  }
  const int64_t fit = smaller(op.block, grid.count);
  if (fit * tile_halves > 2 * team.scratch_floats) return 1;
  BFloat16* v = reinterpret_cast<BFloat16*>(team.scratch);
  const Range mine = share(grid.count, 1, team.thread, team.threads);
  const int64_t total = mine.end - mine.begin, blocks = divide_up(total, fit);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = mine.begin + total * block / blocks;
    const int64_t count = mine.begin + total * (block + 1) / blocks - begin;
    for (int64_t group = 0; group < groups_of(count); ++group)
      transform_group(op, grid, begin, group_range(count, group), v);
    multiply_tiles(op, grid, begin, count, v, Range{0, panels});
  }
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
