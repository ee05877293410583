#include "conv3x3/conv3x3.h"

#if defined(__AVX2__)
#include "common/cache.h"
#include "common/threads.h"
#include "conv3x3/workspace.h"
#include "nhwc/panel.h"
#include "nhwc/winograd.h"
#include "nhwc/winograd_transforms.h"
#endif

namespace iddpm {
namespace IDDPM_ISA {

#if defined(__AVX2__)

namespace {

// Weights [K, C, 3, 3] -> packed [(m + 2)^2][C][32], for the panel of output channels from `first`.
template <int M>
void transform_panel(const Conv3x3Args& args, int64_t first, float* packed) {
  constexpr int P = M + 2;
  const FilterView& w = args.weight;
  const int64_t columns = smaller(kPanel, args.columns - first);
  for (int64_t c = 0; c < args.channels; ++c) {
    alignas(64) float taps[9][kPanel];
    const float* filter = w.data + first * w.column + c * w.channel;
    for (int64_t k = 0; k < columns; ++k, filter += w.column)
      for (int t = 0; t < 9; ++t) taps[t][k] = filter[t / 3 * w.row + t % 3 * w.tap];
    for (int64_t k = 0; k < columns; k += kWidth) {
      nv half[P][3];
      IDDPM_UNROLL
      for (int j = 0; j < 3; ++j) {
        nv g[3], u[P];
        IDDPM_UNROLL
        for (int i = 0; i < 3; ++i) g[i] = load<nv>(&taps[3 * i + j][k]);
        Transform<M>::filter(g, u);
        IDDPM_UNROLL
        for (int i = 0; i < P; ++i) half[i][j] = u[i];
      }
      IDDPM_UNROLL
      for (int i = 0; i < P; ++i) {
        nv u[P];
        Transform<M>::filter(half[i], u);
        IDDPM_UNROLL
        for (int j = 0; j < P; ++j)
          store(packed + ((i * P + j) * args.channels + c) * kPanel + k, u[j]);
      }
    }
  }
}

template <class T>
int run(const Conv3x3Args& args, int num_threads) {
  const int64_t elements = winograd_elements(args.tile);
  const int64_t panels = divide_up(args.columns, kPanel);
  const int64_t tiles = grid_of(args.height, args.width, args.tile, args.n).count;
  const int64_t block =
      winograd_block(args.tile, args.channels, args.columns, false, second_level_bytes());
  const int64_t scratch =
      round_up(winograd_scratch(args.tile, tiles, args.channels, block, num_threads), 16);
  const int64_t shared = winograd_shared(args.tile, tiles, args.channels, num_threads);
  const int64_t packed_floats = panels * elements * args.channels * kPanel;
  Workspace memory(packed_floats + Workspace::rounded(shared) + scratch * num_threads);
  if (memory.failed()) return kNoMemory;
  float* packed = memory.take(packed_floats);
  float* shared_data = memory.take(shared);
  float* scratch_data = memory.take(scratch * num_threads);
  const WinogradConv<T> op{args.height,
                           args.width,
                           static_cast<const T*>(args.in),
                           args.in_stride,
                           args.channels,
                           args.columns,
                           packed,
                           args.bias,
                           nullptr,
                           0,
                           static_cast<T*>(args.out),
                           args.out_stride,
                           args.tile,
                           args.upscale,
                           block};
  int status = kDone;
  for_threads(num_threads, false, [&](int64_t thread, int64_t threads) {
    const Team team{thread, threads, args.n, shared_data, shared, scratch_data + thread * scratch,
                    scratch};
    const Range mine = share(panels, 1, thread, threads);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      float* here = packed + panel * elements * args.channels * kPanel;
      if (args.tile == 4)
        transform_panel<4>(args, panel * kPanel, here);
      else
        transform_panel<2>(args, panel * kPanel, here);
    }
    barrier(team);
    if (run_winograd(op, team) && thread == 0) status = kNoMemory;
  });
  return status;
}

}  // namespace

int conv3x3(const Conv3x3Args& args, int num_threads) {
  if (args.tile == 0) {
    const auto kernel = IDDPM_AMX(conv3x3_tiles);
    return kernel ? kernel(args, num_threads) : kNoInstructions;
  }
  return args.dtype == DType::kFloat32 ? run<float>(args, num_threads)
                                       : run<BFloat16>(args, num_threads);
}

#else

int conv3x3(const Conv3x3Args&, int) { return kNoInstructions; }

#endif

}  // namespace IDDPM_ISA
}  // namespace iddpm
