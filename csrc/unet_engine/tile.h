// The register tile that every matrix product of the engine is made of.
//
// c [rows, columns] = a [rows, depth] * b [depth, columns], with b in rows of `b_stride` floats: a
// packed panel, or keys and values; kTransposed takes a [depth, rows]. A tile keeps R x V vectors
// of c in registers (12 x 2 of 32 registers with AVX-512, 6 x 2 of 16 with AVX2), so that a step
// over depth loads V vectors, broadcasts R values and does R x V multiply-adds.
#pragma once

#include "native.h"

namespace iddpm {
namespace IDDPM_ISA {

// What is added to a product as it is stored; null pointers add nothing.
struct Addends {
  const float* bias;      // [columns]
  const float* residual;  // [rows, columns]
  int64_t residual_stride;
};

template <int R, int V, bool kTransposed>
static void tile(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                 float* c, int64_t c_stride, const Addends& add) {
  nv sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sum[i][j] = nv{};
  for (int64_t k = 0; k < depth; ++k) {
    nv row[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) row[j] = nload(b + j * kWidth);
    b += b_stride;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const nv value = nsplat(kTransposed ? a[k * a_stride + i] : a[i * a_stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[i][j] += value * row[j];
    }
  }
  if (add.bias) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const nv bias = nload(add.bias + j * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) sum[i][j] += bias;
    }
  }
  if (add.residual) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j)
        sum[i][j] += nload(add.residual + i * add.residual_stride + j * kWidth);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) nstore(c + i * c_stride + j * kWidth, sum[i][j]);
}

template <int V, bool kTransposed>
IDDPM_NATIVE void tile_rows(int64_t rows, int64_t depth, const float* a, int64_t a_stride,
                            const float* b, int64_t b_stride, float* c, int64_t c_stride,
                            const Addends& add) {
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

// At most one panel wide: columns is a multiple of 16, at most 32. Any number of rows, cut evenly.
template <bool kTransposed = false>
static inline void multiply_panel(int64_t rows, int64_t columns, int64_t depth, const float* a,
                                  int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                  int64_t c_stride, const Addends& add) {
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = rows * (block + 1) / blocks;
    for (int64_t column = 0; column < columns; column += 2 * kWidth) {
      Addends here = add;
      if (here.bias) here.bias += column;
      if (here.residual) here.residual += row * add.residual_stride + column;
      const float* a_here = a + (kTransposed ? row : row * a_stride);
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
