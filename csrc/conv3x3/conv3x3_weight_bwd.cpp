// The gradient of the weights in Winograd's domain. The forward pass is linear in the transformed
// weights, y = A^T [(G g G^T) . v] A with v = B^T d B, so that
//
//   dg = G^T [sum over tiles of v . (A dy A^T)] G,
//
// which takes (m + 2)^2 products for m^2 outputs, like the convolution itself, instead of nine for
// each. For each of the (m + 2)^2 elements the sum over tiles is a matrix product. Blocks of tiles
// are processed in order, so that the order of the sum does not depend on the threads.
#include "conv3x3/conv3x3.h"

#if defined(__AVX2__)
#include "common/threads.h"
#include "conv3x3/workspace.h"
#include "nhwc/panel.h"
#include "nhwc/winograd_tiles.h"
#endif

namespace iddpm {
namespace IDDPM_ISA {

#if defined(__AVX2__)

namespace {

constexpr int64_t kBlockFloats = 160 * 1024;  // of a block's transformed tiles
constexpr int64_t kBlockTiles = 96;

// m[e * element_stride + k] of one tile of dy, and at e = (M + 2)^2 the sum of the tile.
template <int M, class T>
void transform_gradient(const Conv3x3WeightBwdArgs& args, const Grid& grid, int64_t index, float* m,
                        int64_t element_stride) {
  constexpr int P = M + 2;
  const int64_t column = index % grid.columns, row = index / grid.columns % grid.rows;
  const int64_t sample = index / (grid.columns * grid.rows);
  const int64_t height = smaller(M, args.height - row * M);
  const int64_t width = smaller(M, args.width - column * M);
  const T* corner = static_cast<const T*>(args.dy) +
                    ((sample * args.height + row * M) * args.width + column * M) * args.dy_stride;
  for (int64_t k = 0; k < args.columns; k += kWidth) {
    nv half[P][M], total = nv{};
    IDDPM_UNROLL
    for (int j = 0; j < M; ++j) {
      nv y[M], t[P];
      IDDPM_UNROLL
      for (int i = 0; i < M; ++i) {
        const bool inside = i < height && j < width;
        y[i] = inside ? load<nv>(corner + (i * args.width + j) * args.dy_stride + k) : nv{};
        total += y[i];
      }
      Transform<M>::output_adjoint(y, t);
      IDDPM_UNROLL
      for (int i = 0; i < P; ++i) half[i][j] = t[i];
    }
    IDDPM_UNROLL
    for (int i = 0; i < P; ++i) {
      nv t[P];
      Transform<M>::output_adjoint(half[i], t);
      IDDPM_UNROLL
      for (int j = 0; j < P; ++j) store(m + (i * P + j) * element_stride + k, t[j]);
    }
    store(m + P * P * element_stride + k, total);
  }
}

// sums [(M + 2)^2][C][32] of a panel -> dweight.
template <int M>
void transform_panel(const Conv3x3WeightBwdArgs& args, int64_t first, const float* sums) {
  constexpr int P = M + 2;
  const FilterView& w = args.dweight;
  const int64_t columns = smaller(kPanel, args.columns - first);
  for (int64_t c = 0; c < args.channels; ++c) {
    alignas(64) float taps[9][kPanel];
    for (int64_t k = 0; k < columns; k += kWidth) {
      nv half[3][P];
      IDDPM_UNROLL
      for (int j = 0; j < P; ++j) {
        nv u[P], g[3];
        IDDPM_UNROLL
        for (int i = 0; i < P; ++i)
          u[i] = load<nv>(sums + ((i * P + j) * args.channels + c) * kPanel + k);
        Transform<M>::filter_adjoint(u, g);
        IDDPM_UNROLL
        for (int i = 0; i < 3; ++i) half[i][j] = g[i];
      }
      IDDPM_UNROLL
      for (int i = 0; i < 3; ++i) {
        nv g[3];
        Transform<M>::filter_adjoint(half[i], g);
        IDDPM_UNROLL
        for (int j = 0; j < 3; ++j) store(&taps[3 * i + j][k], g[j]);
      }
    }
    float* filter = w.data + first * w.column + c * w.channel;
    for (int64_t k = 0; k < columns; ++k, filter += w.column)
      for (int t = 0; t < 9; ++t) filter[t / 3 * w.row + t % 3 * w.tap] = taps[t][k];
  }
}

// Adds up the sums of the tiles in order.
void add_bias(const float* sums, int64_t pitch, int64_t count, int64_t columns, bool first,
              float* dbias) {
  for (int64_t k = 0; k < columns; k += kWidth) {
    nv total = first ? nv{} : load<nv>(dbias + k);
    for (int64_t t = 0; t < count; ++t) total += load<nv>(sums + t * pitch + k);
    store(dbias + k, total);
  }
}

template <int M, class T>
int run(const Conv3x3WeightBwdArgs& args, int num_threads) {
  constexpr int64_t E = (M + 2) * (M + 2);
  const Grid grid = grid_of(args.height, args.width, M, args.n);
  const int64_t v_pitch = args.channels + kRowPad, m_pitch = args.columns + kRowPad;
  const int64_t panels = divide_up(args.columns, kPanel);
  const int64_t fit = smaller(kBlockTiles, kBlockFloats / (E * (v_pitch + m_pitch)));
  const int64_t block = smaller(larger(fit, 2 * kTileRows), grid.count);
  const int64_t v_floats = E * block * v_pitch, m_floats = (E + 1) * block * m_pitch;
  const int64_t panel_floats = E * args.channels * kPanel;
  Workspace memory(Workspace::rounded(v_floats) + Workspace::rounded(m_floats) +
                   panels * panel_floats);
  if (memory.failed()) return kNoMemory;
  float* v = memory.take(v_floats);
  float* m = memory.take(m_floats);
  float* sums = memory.take(panels * panel_floats);
  WinogradConv<T> op{};
  op.height = args.height;
  op.width = args.width;
  op.in = static_cast<const T*>(args.in);
  op.in_stride = args.in_stride;
  op.channels = args.channels;
  op.tile = M;
  op.upscale = args.upscale;

  for_threads(num_threads, false, [&](int64_t thread, int64_t threads) {
    const Team team{thread, threads, args.n, nullptr, 0, nullptr, 0};
    const int64_t blocks = divide_up(grid.count, block);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = grid.count * b / blocks;
      const int64_t count = grid.count * (b + 1) / blocks - begin;
      const Range tiles = share(count, 1, thread, threads);
      for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        transform_input<M>(op, grid, begin + t, v + t * v_pitch, count * v_pitch);
        transform_gradient<M, T>(args, grid, begin + t, m + t * m_pitch, count * m_pitch);
      }
      barrier(team);
      const Range work = share(panels * E, 1, thread, threads);
      for (int64_t i = work.begin; i < work.end; ++i) {
        const int64_t e = i / panels, panel = i % panels;
        float* sum = sums + panel * panel_floats + e * args.channels * kPanel;
        const Addends before{nullptr, b == 0 ? nullptr : sum, kPanel};
        multiply_panel<true>(args.channels, smaller(kPanel, args.columns - panel * kPanel), count,
                             v + e * count * v_pitch, v_pitch,
                             m + e * count * m_pitch + panel * kPanel, m_pitch, sum, kPanel,
                             before);
      }
      if (args.dbias && thread == threads - 1)
        add_bias(m + E * count * m_pitch, m_pitch, count, args.columns, b == 0, args.dbias);
      barrier(team);
    }
    const Range mine = share(panels, 1, thread, threads);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel)
      transform_panel<M>(args, panel * kPanel, sums + panel * panel_floats);
  });
  return kDone;
}

}  // namespace

int conv3x3_weight_bwd(const Conv3x3WeightBwdArgs& args, int num_threads) {
  if (args.tile == 0) {
    const auto kernel = IDDPM_AMX(conv3x3_weight_bwd_tiles);
    return kernel ? kernel(args, num_threads) : kNoInstructions;
  }
  if (args.dtype == DType::kFloat32)
    return args.tile == 4 ? run<4, float>(args, num_threads) : run<2, float>(args, num_threads);
  return args.tile == 4 ? run<4, BFloat16>(args, num_threads) : run<2, BFloat16>(args, num_threads);
}

#else

int conv3x3_weight_bwd(const Conv3x3WeightBwdArgs&, int) { return kNoInstructions; }

#endif

}  // namespace IDDPM_ISA
}  // namespace iddpm
