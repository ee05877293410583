#pragma once

#include "common/cuda_compat.cuh"
#include "pixel_rows/pixel_rows.h"

namespace iddpm {

constexpr int kPixelRowsThreads = 256;

template <typename T>
IDDPM_DEVICE T* at_row(const PixelRows& rows, int64_t row, int64_t c) {
  return static_cast<T*>(rows.data) + row * rows.pitch + c;
}

inline bool rows_in_packs(const PixelRows& rows, int64_t c, int64_t pack, int64_t size) {
  return rows.data == nullptr ||
         (c % pack == 0 && rows.pitch % pack == 0 &&
          reinterpret_cast<uintptr_t>(rows.data) % static_cast<uintptr_t>(pack * size) == 0);
}

// A block sums the rows of one chunk over `width` channels, in packs of V.
template <typename T, int V>
__global__ void __launch_bounds__(kPixelRowsThreads)
    channel_sums_kernel(const ChannelSumsArgs a, const int64_t chunks, const int width) {
  IDDPM_SMEM(float, parts, kPixelRowsThreads* V);
  const int64_t slice = blockIdx.x / chunks, chunk = blockIdx.x - slice * chunks;
  const int thread = static_cast<int>(threadIdx.x), packs = width / V;
  const int lanes = kPixelRowsThreads / packs, lane = thread / packs;
  const int local = (thread - lane * packs) * V;
  const int64_t c = slice * width + local;
  const int64_t begin = a.rows * chunk / chunks, end = a.rows * (chunk + 1) / chunks;
  float sums[V] = {};
  if (lane < lanes && c < a.c) {
#pragma unroll 4
    for (int64_t row = begin + lane; row < end; row += lanes) {
      float values[V];
      load_floats<T, V>(at_row<const T>(a.x, row, c), values);
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] += values[i];
    }
  }
  if (lane < lanes)
#pragma unroll
    for (int i = 0; i < V; ++i) parts[lane * width + local + i] = sums[i];
  __syncthreads();
  for (int k = thread; k < width; k += kPixelRowsThreads) {
    float total = 0.0f;
    for (int j = 0; j < lanes; ++j) total += parts[j * width + k];
    if (slice * width + k < a.c) a.workspace[chunk * a.c + slice * width + k] = total;
  }
}

// A block adds the chunks of 32 channels, with eight threads per channel.
__global__ void __launch_bounds__(kPixelRowsThreads)
    channel_sums_total_kernel(const ChannelSumsArgs a, const int64_t chunks) {
  IDDPM_SMEM(float, parts, kPixelRowsThreads);
  constexpr int kColumns = 32, kParts = kPixelRowsThreads / kColumns;
  const int thread = static_cast<int>(threadIdx.x), part = thread / kColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + thread % kColumns;
  float total = 0.0f;
  if (c < a.c)
    for (int64_t chunk = part; chunk < chunks; chunk += kParts)
      total += a.workspace[chunk * a.c + c];
  parts[thread] = total;
  __syncthreads();
  if (part == 0 && c < a.c) {
#pragma unroll
    for (int j = 1; j < kParts; ++j) total += parts[j * kColumns + thread];
    a.sums[c] = total;
  }
}

template <typename T, int V>
void launch_channel_sums(const ChannelSumsArgs& a, void* stream) {
  // A block has at most 64 packs per row, and so at least four rows in flight.
  const int64_t packs = (a.c + V - 1) / V, slices = (packs + 63) / 64;
  const int width = static_cast<int>((packs + slices - 1) / slices) * V;
  const int64_t chunks = channel_sums_chunks(a.rows);
  const dim3 block(kPixelRowsThreads), grid(static_cast<unsigned>(slices * chunks));
  IDDPM_LAUNCH((channel_sums_kernel<T, V>), grid, block, 0, stream, a, chunks, width);
  const dim3 columns(static_cast<unsigned>((a.c + 31) / 32));
  IDDPM_LAUNCH(channel_sums_total_kernel, columns, block, 0, stream, a, chunks);
}

template <typename T>
void launch_channel_sums(const ChannelSumsArgs& a, void* stream) {
  constexpr int kPack = kPackSize<T>;
  if (rows_in_packs(a.x, a.c, kPack, sizeof(T)))
    launch_channel_sums<T, kPack>(a, stream);
  else
    launch_channel_sums<T, 1>(a, stream);
}

template <typename T, int V>
__global__ void __launch_bounds__(kPixelRowsThreads) settle_kernel(const SettleArgs a) {
  const int64_t packs = a.c / V, count = a.rows * packs;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPixelRowsThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t row = at / packs, c = (at - row * packs) * V;
  float values[V], more[V];
  T* const x = at_row<T>(a.x, row, c);
  load_floats<T, V>(x, values);
  if (a.residual.data) {
    load_floats<T, V>(at_row<const T>(a.residual, row, c), more);
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] += more[i];
  }
  if (a.bias)
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] += a.bias[c + i];
  store_floats<T, V>(x, values);
}

template <typename T, int V>
void launch_settle(const SettleArgs& a, void* stream) {
  const int64_t count = a.rows * (a.c / V);
  const dim3 block(kPixelRowsThreads);
  const dim3 grid(static_cast<unsigned>((count + kPixelRowsThreads - 1) / kPixelRowsThreads));
  IDDPM_LAUNCH((settle_kernel<T, V>), grid, block, 0, stream, a);
}

template <typename T>
void launch_settle(const SettleArgs& a, void* stream) {
  constexpr int kPack = kPackSize<T>;
  if (rows_in_packs(a.x, a.c, kPack, sizeof(T)) && rows_in_packs(a.residual, a.c, kPack, sizeof(T)))
    launch_settle<T, kPack>(a, stream);
  else
    launch_settle<T, 1>(a, stream);
}

template <typename T, int V>
__global__ void __launch_bounds__(kPixelRowsThreads) interleave_kernel(const InterleaveArgs a) {
  const int64_t packs = a.c / V, count = a.n * 4 * a.height * a.width * packs;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPixelRowsThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t pixel = at / packs, c = (at - pixel * packs) * V;
  const int64_t line = pixel / (2 * a.width), x = pixel - line * 2 * a.width;
  const int64_t sample = line / (2 * a.height), y = line - sample * 2 * a.height;
  const int64_t row = (sample * (a.height + 1) + (y + 1) / 2) * (a.width + 1) + (x + 1) / 2;
  const T* const from = static_cast<const T*>(a.z) + (4 * row + y % 2 * 2 + x % 2) * a.c + c;
  store_pack<T, V>(static_cast<T*>(a.y) + pixel * a.c + c, load_pack<T, V>(from));
}

template <typename T, int V>
void launch_interleave(const InterleaveArgs& a, void* stream) {
  const int64_t count = a.n * 4 * a.height * a.width * (a.c / V);
  const dim3 block(kPixelRowsThreads);
  const dim3 grid(static_cast<unsigned>((count + kPixelRowsThreads - 1) / kPixelRowsThreads));
  IDDPM_LAUNCH((interleave_kernel<T, V>), grid, block, 0, stream, a);
}

template <typename T>
void launch_interleave(const InterleaveArgs& a, void* stream) {
  constexpr int kPack = kPackSize<T>;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(a.z) | reinterpret_cast<uintptr_t>(a.y)) % 16 == 0;
  if (aligned && a.c % kPack == 0)
    launch_interleave<T, kPack>(a, stream);
  else
    launch_interleave<T, 1>(a, stream);
}

}  // namespace iddpm
