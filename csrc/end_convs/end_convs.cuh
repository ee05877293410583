#pragma once

#include "common/cuda_compat.cuh"
#include "end_convs/end_convs.h"

namespace iddpm {

constexpr int kEndConvThreads = 256;
constexpr int kTaps = 9;

// ---- the first: a thread computes four columns of eight pixels in a row

constexpr int kFirstPixels = 8, kFirstColumns = 4, kFirstTile = 128;

template <typename T>
__global__ void __launch_bounds__(kEndConvThreads, 2)
    first_conv_kernel(const FirstConvArgs a, const int64_t runs, const int64_t tiles,
                      const int per_block) {
  IDDPM_SMEM_DYNAMIC(float, weight);  // [c * 9, columns]
  const int64_t tile = blockIdx.x % tiles, block = blockIdx.x / tiles;
  const int64_t first = tile * kFirstTile;
  const int columns = static_cast<int>(a.k - first < kFirstTile ? a.k - first : kFirstTile);
  const int rows = static_cast<int>(a.c) * kTaps, thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < rows * columns; i += kEndConvThreads)
    weight[i] = a.weight[i / columns * a.k + first + i % columns];
  __syncthreads();

  const int packs = columns / kFirstColumns;
  const int lane = thread / packs, column = (thread - lane * packs) * kFirstColumns;
  const int64_t run = block * per_block + lane;
  if (lane >= per_block || run >= runs) return;
  const int64_t runs_a_row = (a.width + kFirstPixels - 1) / kFirstPixels;
  const int64_t line = run / runs_a_row, x = (run - line * runs_a_row) * kFirstPixels;
  const int64_t sample = line / a.height, y = line - sample * a.height;
  const float* const image = static_cast<const float*>(a.x.data) + sample * a.x.sample;

  const int step = static_cast<int>(a.x.pixel), width = static_cast<int>(a.width);
  const int left = static_cast<int>(x) - 1;
  float sums[kFirstPixels][kFirstColumns] = {};
#pragma unroll 1
  for (int c = 0; c < a.c; ++c)
#pragma unroll 1
    for (int ky = 0; ky < 3; ++ky) {
      const int64_t from = y + ky - 1;
      if (from < 0 || from >= a.height) continue;
      const float* const pixels = image + c * a.x.channel + from * a.width * a.x.pixel;
      float in[kFirstPixels + 2];
#pragma unroll
      for (int i = 0; i < kFirstPixels + 2; ++i)
        in[i] = left + i < 0 || left + i >= width ? 0.0f : pixels[(left + i) * step];
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
        const auto w = *reinterpret_cast<const Pack<float, kFirstColumns>*>(
            weight + (c * kTaps + ky * 3 + kx) * columns + column);
#pragma unroll
        for (int p = 0; p < kFirstPixels; ++p)
#pragma unroll
          for (int k = 0; k < kFirstColumns; ++k) sums[p][k] += in[p + kx] * w.v[k];
      }
    }
  T* const out = static_cast<T*>(a.y) + (line * a.width + x) * a.k + first + column;
#pragma unroll
  for (int p = 0; p < kFirstPixels; ++p)
    if (x + p < a.width) store_floats<T, kFirstColumns>(out + p * a.k, sums[p]);
}

template <typename T>
void launch_first_conv(const FirstConvArgs& a, void* stream) {
  const int64_t tiles = (a.k + kFirstTile - 1) / kFirstTile;
  const int64_t runs = a.n * a.height * ((a.width + kFirstPixels - 1) / kFirstPixels);
  const int64_t columns = a.k < kFirstTile ? a.k : kFirstTile;
  const int64_t per_block = kEndConvThreads / (columns / kFirstColumns);
  const int64_t bytes = a.c * kTaps * columns * static_cast<int64_t>(sizeof(float));
  const dim3 grid(static_cast<unsigned>((runs + per_block - 1) / per_block * tiles));
  IDDPM_LAUNCH(first_conv_kernel<T>, grid, dim3(kEndConvThreads), bytes, stream, a, runs, tiles,
               static_cast<int>(per_block));
}

// ---- the last: a block computes R rows of 32 pixels, its groups of eight threads from other
// channels

constexpr int kLastColumns = 32, kLastPixels = 4, kLastGroups = kEndConvThreads / 8;
// Four rows a block share their neighbours; with fewer blocks than these, one row keeps more of the
// device busy.
constexpr int kLastRows = 4;
constexpr int64_t kLastFewBlocks = 66;
// Odd, so that the four groups of a warp, which read other rows or channels, meet in no bank.
constexpr int kLastPitch = 37;

template <int K, int R>
struct LastShelf {
  static constexpr int kPlane = (R + 2) * kLastPitch, kFeatures = kLastConvSlice * kPlane;
  static constexpr int kSums = kLastGroups * kLastColumns * K;
  static constexpr int kFloats = kFeatures > kSums ? kFeatures : kSums;
};

template <typename T, int K, int R>
__global__ void __launch_bounds__(kEndConvThreads, 3)
    last_conv_kernel(const LastConvArgs a, const int64_t down, const int64_t across) {
  using Size = LastShelf<K, R>;
  // [32 channels][R + 2][37] of features; later the groups' sums [slices][K][R][32].
  IDDPM_SMEM_DYNAMIC(float, shelf);
  float* const weight = shelf + Size::kFloats;  // [32 channels][9][K]
  const int thread = static_cast<int>(threadIdx.x), group = thread / 8;
  const int slice = group / R, row = group % R, left = thread % 8 * kLastPixels;
  const int64_t tile_x = blockIdx.x % across, rest = blockIdx.x / across;
  const int64_t sample = rest / down, y0 = (rest - sample * down) * R;
  const int64_t x0 = tile_x * kLastColumns;
  const T* const image = static_cast<const T*>(a.x) + sample * a.height * a.width * a.c;

  constexpr int kPack = 4, kPacks = kLastConvSlice / kPack;
  constexpr int kCells = (R + 2) * (kLastColumns + 2);
  constexpr int kSlices = kLastGroups / R, kChannels = kLastConvSlice / kSlices;
  float sums[kLastPixels][K] = {};
  for (int64_t c0 = 0; c0 < a.c; c0 += kLastConvSlice) {
    __syncthreads();
    for (int i = thread; i < kCells * kPacks; i += kEndConvThreads) {
      const int cell = i / kPacks, c = (i - cell * kPacks) * kPack;
      const int cy = cell / (kLastColumns + 2), cx = cell - cy * (kLastColumns + 2);
      const int64_t y = y0 + cy - 1, x = x0 + cx - 1;
      float values[kPack] = {};
      if (y >= 0 && y < a.height && x >= 0 && x < a.width)
        load_floats<T, kPack>(image + (y * a.width + x) * a.c + c0 + c, values);
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        shelf[(c + j) * Size::kPlane + cy * kLastPitch + cx] = values[j];
    }
    for (int i = thread; i < kLastConvSlice * kTaps * K; i += kEndConvThreads)
      weight[i] = a.weight[c0 * kTaps * K + i];
    __syncthreads();
#pragma unroll 1
    for (int c = slice * kChannels; c < (slice + 1) * kChannels; ++c)
#pragma unroll
      for (int ky = 0; ky < 3; ++ky) {
        float in[kLastPixels + 2];
#pragma unroll
        for (int i = 0; i < kLastPixels + 2; ++i)
          in[i] = shelf[c * Size::kPlane + (row + ky) * kLastPitch + left + i];
        constexpr int kTogether = K % 2 == 0 ? 2 : 1;
        Pack<float, kTogether> w[3 * K / kTogether];
#pragma unroll
        for (int i = 0; i < 3 * K / kTogether; ++i)
          w[i] =
              reinterpret_cast<const Pack<float, kTogether>*>(weight + (c * kTaps + ky * 3) * K)[i];
#pragma unroll
        for (int kx = 0; kx < 3; ++kx)
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const float value = w[(kx * K + k) / kTogether].v[(kx * K + k) % kTogether];
#pragma unroll
            for (int p = 0; p < kLastPixels; ++p) sums[p][k] += in[p + kx] * value;
          }
      }
  }
  __syncthreads();
#pragma unroll
  for (int p = 0; p < kLastPixels; ++p)
#pragma unroll
    for (int k = 0; k < K; ++k)
      shelf[((slice * K + k) * R + row) * kLastColumns + left + p] = sums[p][k];
  __syncthreads();
  constexpr int kTile = R * kLastColumns;
  for (int i = thread; i < K * kTile; i += kEndConvThreads) {
    const int k = i / kTile, pixel = i - k * kTile;
    const int64_t y = y0 + pixel / kLastColumns, x = x0 + pixel % kLastColumns;
    float total = a.bias[k];
#pragma unroll
    for (int j = 0; j < kSlices; ++j) total += shelf[j * K * kTile + i];
    if (y < a.height && x < a.width) a.y[((sample * K + k) * a.height + y) * a.width + x] = total;
  }
}

template <typename T, int K, int R>
void launch_last_conv(const LastConvArgs& a, void* stream) {
  const int64_t down = (a.height + R - 1) / R;
  const int64_t across = (a.width + kLastColumns - 1) / kLastColumns;
  if constexpr (R > 1)
    if (a.n * down * across < kLastFewBlocks) return launch_last_conv<T, K, 1>(a, stream);
  const int64_t floats = LastShelf<K, R>::kFloats + kLastConvSlice * kTaps * K;
  const dim3 grid(static_cast<unsigned>(a.n * down * across));
  IDDPM_LAUNCH((last_conv_kernel<T, K, R>), grid, dim3(kEndConvThreads),
               floats * static_cast<int64_t>(sizeof(float)), stream, a, down, across);
}

// For 1 and 3 image channels, with or without a learned variance.
template <typename T>
bool launch_last_conv(const LastConvArgs& a, void* stream) {
  switch (a.k) {
    case 1:
      launch_last_conv<T, 1, kLastRows>(a, stream);
      return true;
    case 2:
      launch_last_conv<T, 2, kLastRows>(a, stream);
      return true;
    case 3:
      launch_last_conv<T, 3, kLastRows>(a, stream);
      return true;
    case 6:
      launch_last_conv<T, 6, kLastRows>(a, stream);
      return true;
    default:
      return false;
  }
}

}  // namespace iddpm
