// The register tile of all matrix products on the CPU.
//
// c [rows, columns] = a [rows, depth] * b [depth, columns], with b in rows of `b_stride` floats: a
// packed panel, or keys and values; kTransposed takes a [depth, rows]. A tile keeps R x V vectors
// of c in registers (12 x 2 of 32 registers with AVX-512, 6 x 2 of 16 with AVX2), so that a step
// over depth loads V vectors, broadcasts R values and does R x V multiply-adds.
#pragma once

#include "common/lanes.h"
#include "nhwc/packing.h"

namespace iddpm {
namespace IDDPM_ISA {

#if defined(__AVX512F__)
constexpr int64_t kTileRows = 12;  // rows of a register tile: 12 x 2 accumulators of 32 registers
#else
constexpr int64_t kTileRows = 6;  // 6 x 2 accumulators of 16 registers
#endif
static_assert(kTileRows <= kMostTileRows, "scratch is sized for it");

// Terms to add to a product when it is stored; null pointers add nothing.
struct Addends {
  const float* bias;      // [columns]
  const float* residual;  // [rows, columns]
  int64_t residual_stride;
};

template <bool kTransposed, int R, int V>
IDDPM_INLINE void accumulate(int64_t depth, const float* a, int64_t a_stride, const float* b,
                             int64_t b_stride, nv (&sum)[R][V]) {
  for (int64_t k = 0; k < depth; ++k) {
    nv row[V];
    IDDPM_UNROLL
    for (int j = 0; j < V; ++j) row[j] = load<nv>(b + j * kWidth);
    b += b_stride;
    IDDPM_UNROLL
    for (int i = 0; i < R; ++i) {
      const nv value = splat<nv>(kTransposed ? a[k * a_stride + i] : a[i * a_stride + k]);
      IDDPM_UNROLL
      for (int j = 0; j < V; ++j) sum[i][j] += value * row[j];
    }
  }
}

#if defined(__AVX512BF16__)
// For bfloat16: depth is even, and b holds pairs of rows, [depth / 2][b_stride][2].
template <bool kTransposed, int R, int V>
IDDPM_INLINE void accumulate(int64_t depth, const BFloat16* a, int64_t a_stride, const BFloat16* b,
                             int64_t b_stride, nv (&sum)[R][V]) {
  static_assert(!kTransposed, "pairs lie along the depth");
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh row[V];
    IDDPM_UNROLL
    for (int j = 0; j < V; ++j) std::memcpy(&row[j], b + j * 2 * kWidth, sizeof row[j]);
    b += 2 * b_stride;
    IDDPM_UNROLL
    for (int i = 0; i < R; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * a_stride + k, sizeof pair);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      IDDPM_UNROLL
      for (int j = 0; j < V; ++j)
        sum[i][j] = (nv)_mm512_dpbf16_ps((__m512)sum[i][j], value, row[j]);
    }
  }
}
#endif

template <int R, int V, bool kTransposed, class T>
static void tile(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                 float* c, int64_t c_stride, const Addends& add) {
  nv sum[R][V];
  IDDPM_UNROLL
  for (int i = 0; i < R; ++i) {
    IDDPM_UNROLL
    for (int j = 0; j < V; ++j) sum[i][j] = nv{};
  }
  accumulate<kTransposed>(depth, a, a_stride, b, b_stride, sum);
  if (add.bias) {
    IDDPM_UNROLL
    for (int j = 0; j < V; ++j) {
      const nv bias = load<nv>(add.bias + j * kWidth);
      IDDPM_UNROLL
      for (int i = 0; i < R; ++i) sum[i][j] += bias;
    }
  }
  if (add.residual) {
    IDDPM_UNROLL
    for (int i = 0; i < R; ++i) {
      IDDPM_UNROLL
      for (int j = 0; j < V; ++j)
        sum[i][j] += load<nv>(add.residual + i * add.residual_stride + j * kWidth);
    }
  }
  IDDPM_UNROLL
  for (int i = 0; i < R; ++i) {
    IDDPM_UNROLL
    for (int j = 0; j < V; ++j) store(c + i * c_stride + j * kWidth, sum[i][j]);
  }
}

template <int V, bool kTransposed, class T>
IDDPM_INLINE void tile_rows(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b,
                            int64_t b_stride, float* c, int64_t c_stride, const Addends& add) {
#define IDDPM_TILE_CASE(R) \
  case R:                  \
    return tile<R, V, kTransposed>(depth, a, a_stride, b, b_stride, c, c_stride, add)
  switch (rows) {
    IDDPM_TILE_CASE(1);
    IDDPM_TILE_CASE(2);
    IDDPM_TILE_CASE(3);
    IDDPM_TILE_CASE(4);
    IDDPM_TILE_CASE(5);
    IDDPM_TILE_CASE(6);
#if defined(__AVX512F__)
    IDDPM_TILE_CASE(7);
    IDDPM_TILE_CASE(8);
    IDDPM_TILE_CASE(9);
    IDDPM_TILE_CASE(10);
    IDDPM_TILE_CASE(11);
    IDDPM_TILE_CASE(12);
#endif
  }
#undef IDDPM_TILE_CASE
}

// At most one panel wide: columns is 16 or 32. Any number of rows, divided evenly into tiles.
template <bool kTransposed = false, class T>
static inline void multiply_panel(int64_t rows, int64_t columns, int64_t depth, const T* a,
                                  int64_t a_stride, const T* b, int64_t b_stride, float* c,
                                  int64_t c_stride, const Addends& add) {
  const int64_t blocks = divide_up(rows, kTileRows);
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = rows * (block + 1) / blocks;
    for (int64_t column = 0; column < columns; column += 2 * kWidth) {
      Addends here = add;
      if (here.bias) here.bias += column;
      if (here.residual) here.residual += row * add.residual_stride + column;
      const T* a_here = a + (kTransposed ? row : row * a_stride);
      float* c_here = c + row * c_stride + column;
      if (columns - column >= 2 * kWidth)
        tile_rows<2, kTransposed>(end - row, depth, a_here, a_stride, b + column, b_stride, c_here,
                                  c_stride, here);
      else
        tile_rows<1, kTransposed>(end - row, depth, a_here, a_stride, b + column, b_stride, c_here,
                                  c_stride, here);
    }
    row = end;
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
