// What Winograd's convolution, its gradients and the engine's plan share.
#pragma once

#include "team.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr int64_t kWinogradChannels = 4096;  // at most
constexpr int64_t kRowPad = 16;  // keeps rows of transformed tiles from sharing cache sets

struct Grid {
  int64_t rows, columns, count;  // tiles down, across, in all samples
};

static inline Grid grid_of(int64_t height, int64_t width, int64_t tile, int64_t n) {
  const int64_t rows = (height + tile - 1) / tile, columns = (width + tile - 1) / tile;
  return Grid{rows, columns, rows * columns * n};
}

int run_winograd(const WinogradConv<uint16_t>& op, const Team& team);

}  // namespace IDDPM_ISA
}  // namespace iddpm
