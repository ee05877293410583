// 3 x 3 convolutions by Winograd's minimal filtering, Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016: y = A^T [(G g G^T) . (B^T d B)] A over tiles of m x m
// outputs.
//
// A block of tiles is transformed into scratch, v [(m + 2)^2][tiles][C]; then, a panel of 32 output
// channels at a time, (m + 2)^2 matrix products give u [(m + 2)^2][tiles][32], whose inverse
// transform adds bias and residual as it stores. With few tiles the team transforms all of them
// together and divides the panels instead.
#if defined(__AVX2__)
#include "winograd.h"

#include "tile.h"
#include "winograd_transforms.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

constexpr int64_t kFewTiles = 2 * kTileRows;
alignas(64) const float kZeros[kWinogradChannels] = {};

// v[e * element_stride + c] of one tile, e = 0 .. (M + 2)^2 - 1.
template <int M, class T>
void transform_input(const WinogradConv<T>& op, const Grid& grid, int64_t index, float* v,
                     int64_t element_stride) {
  constexpr int P = M + 2;
  const int64_t column = index % grid.columns, row = index / grid.columns % grid.rows;
  const int64_t sample = index / (grid.columns * grid.rows);
  const int64_t up = op.upscale > 0;
  const int64_t in_width = op.width >> up, in_height = op.height >> up;
  const T* image = op.in + sample * in_height * in_width * op.in_stride;
  const T* zeros = reinterpret_cast<const T*>(kZeros);
  const T* pixel[P][P];
  for (int i = 0; i < P; ++i) {
    const int64_t y = row * M + i - 1;
    const bool inside = y >= 0 && y < op.height;
    for (int j = 0; j < P; ++j) {
      const int64_t x = column * M + j - 1;
      const int64_t source = (y >> up) * in_width + (x >> up);
      pixel[i][j] = inside && x >= 0 && x < op.width ? image + source * op.in_stride : zeros;
    }
  }
  for (int64_t c = 0; c < op.channels; c += kWidth) {
    nv half[P][P];
#pragma GCC unroll 8
    for (int j = 0; j < P; ++j) {
      nv d[P], t[P];
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i) d[i] = nload(pixel[i][j] + c);
      Transform<M>::input(d, t);
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i) half[i][j] = t[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) {
      nv t[P];
      Transform<M>::input(half[i], t);
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j) nstore(v + (i * P + j) * element_stride + c, t[j]);
    }
  }
}

// A tile's outputs, summed over squares of 2 x 2.
template <int M, class T>
void store_sums(const nv (&half)[M][M + 2], int64_t height, int64_t width, int64_t pixel,
                int64_t row, T* out) {
#pragma GCC unroll 8
  for (int i = 0; i < M; i += 2) {
    if (i >= height) break;
    nv upper[M], lower[M];
    Transform<M>::output(half[i], upper);
    Transform<M>::output(half[i + 1], lower);
#pragma GCC unroll 8
    for (int j = 0; j < M; j += 2)
      if (j < width)
        nstore(out + (i / 2 * row + j / 2) * pixel,
               (upper[j] + upper[j + 1]) + (lower[j] + lower[j + 1]));
  }
}

// u[e * element_stride + k] of one tile and `columns` channels from `first` on.
template <int M, class T>
void transform_output(const WinogradConv<T>& op, const Grid& grid, int64_t index, const float* u,
                      int64_t element_stride, int64_t first, int64_t columns) {
  constexpr int P = M + 2;
  const int64_t column = index % grid.columns, row = index / grid.columns % grid.rows;
  const int64_t sample = index / (grid.columns * grid.rows);
  const int64_t height = smaller(M, op.height - row * M), width = smaller(M, op.width - column * M);
  const int64_t corner = (sample * op.height + row * M) * op.width + column * M;
  for (int64_t k = 0; k < columns; k += kWidth) {
    nv half[M][P];
#pragma GCC unroll 8
    for (int j = 0; j < P; ++j) {
      nv m[P], t[M];
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i) m[i] = nload(u + (i * P + j) * element_stride + k);
      Transform<M>::output(m, t);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) half[i][j] = t[i];
    }
    if (op.upscale < 0) {
      store_sums<M>(
          half, height, width, op.out_stride, op.width / 2,
          op.out +
              ((sample * op.height + row * M) * op.width / 4 + column * M / 2) * op.out_stride +
              first + k);
      continue;
    }
    const nv bias = op.bias ? nload(op.bias + first + k) : nv{};
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      if (i >= height) break;
      nv y[M];
      Transform<M>::output(half[i], y);
      const int64_t start = corner + i * op.width;
      T* out = op.out + start * op.out_stride + first + k;
      if (op.residual) {
        const T* residual = op.residual + start * op.residual_stride + first + k;
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j)
          if (j < width)
            nstore(out + j * op.out_stride, y[j] + bias + nload(residual + j * op.residual_stride));
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j)
          if (j < width) nstore(out + j * op.out_stride, y[j] + bias);
      }
    }
  }
}

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
  const int64_t panels = (op.columns + kPanel - 1) / kPanel;
  if (op.channels > kWinogradChannels) return 1;
  if (team.threads > 1 && grid.count < kFewTiles * team.threads) {
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
  const int64_t blocks = (total + fit - 1) / fit;
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

int run_winograd(const WinogradConv<uint16_t>& op, const Team& team) {
  return op.tile == 4 ? run<4>(op, team) : run<2>(op, team);
}

template <class T>
void winograd_input(const WinogradConv<T>& op, const Grid& grid, int64_t index, float* v,
                    int64_t element_stride) {
  if (op.tile == 4)
    transform_input<4>(op, grid, index, v, element_stride);
  else
    transform_input<2>(op, grid, index, v, element_stride);
}

template void winograd_input(const WinogradOp&, const Grid&, int64_t, float*, int64_t);
template void winograd_input(const WinogradConv<uint16_t>&, const Grid&, int64_t, float*, int64_t);

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
