// Products of whole matrices by tiles, and their operands from rows of float32.
//
// The first operand is rows of bfloat16, a multiple of 32 long. The second is tiles
// [columns / 16][depth / 32][16][16][2], made from rows that are its columns, or its rows.
#pragma once

#include "nhwc/amx_tile.h"

namespace iddpm {
namespace IDDPM_ISA {

// A block of c, 16 * Rows by 16 * Columns, in tiles 0 to 3.
template <int Rows, int Columns>
IDDPM_INLINE void multiply_block(const BFloat16* a, int64_t a_stride, int64_t chunks,
                                 const BFloat16* b, float* c, int64_t c_stride, bool add) {
  const BFloat16* lower = a + kTileEdge * a_stride / int64_t{sizeof(BFloat16)};
  const BFloat16* right = b + chunks * kTileHalves;
  float* below = c + kTileEdge * c_stride / int64_t{sizeof(float)};
  if (add) {
    tile_load<0>(c, c_stride);
    if (Columns == 2) tile_load<1>(c + kTileEdge, c_stride);
    if (Rows == 2) tile_load<2>(below, c_stride);
    if (Rows == 2 && Columns == 2) tile_load<3>(below + kTileEdge, c_stride);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t k = 0; k < chunks; ++k) {
    tile_load<6>(b + k * kTileHalves, 64);
    tile_load<4>(a + k * kTileDepth, a_stride);
    tile_multiply<0, 4, 6>();
    if (Columns == 2) {
      tile_load<7>(right + k * kTileHalves, 64);
      tile_multiply<1, 4, 7>();
    }
    if (Rows == 2) {
      tile_load<5>(lower + k * kTileDepth, a_stride);
      tile_multiply<2, 5, 6>();
      if (Columns == 2) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(c, c_stride);
  if (Columns == 2) tile_store<1>(c + kTileEdge, c_stride);
  if (Rows == 2) tile_store<2>(below, c_stride);
  if (Rows == 2 && Columns == 2) tile_store<3>(below + kTileEdge, c_stride);
}

// c [16 * rows, 16 * columns] (+)= a [16 * rows, 32 * chunks] b; strides of a and c in bytes.
static inline void multiply_tiles(const BFloat16* a, int64_t a_stride, int64_t rows, int64_t chunks,
                                  const BFloat16* b, int64_t columns, float* c, int64_t c_stride,
                                  bool add) {
  for (int64_t row = 0; row < rows; row += 2) {
    const BFloat16* from = a + row * kTileEdge * a_stride / int64_t{sizeof(BFloat16)};
    float* to = c + row * kTileEdge * c_stride / int64_t{sizeof(float)};
    const bool two = row + 1 < rows;
    int64_t column = 0;
    for (; column + 1 < columns; column += 2)
      (two ? multiply_block<2, 2> : multiply_block<1, 2>)(from, a_stride, chunks,
                                                          b + column * chunks * kTileHalves,
                                                          to + column * kTileEdge, c_stride, add);
    if (column < columns)
      (two ? multiply_block<2, 1> : multiply_block<1, 1>)(from, a_stride, chunks,
                                                          b + column * chunks * kTileHalves,
                                                          to + column * kTileEdge, c_stride, add);
  }
}

// in [rows][pitch] of `width`, a multiple of 16 -> [padded_rows][depth], with zeros around it.
static inline void round_rows(const float* in, int64_t pitch, int64_t rows, int64_t width,
                              int64_t padded_rows, int64_t depth, BFloat16* out) {
  for (int64_t row = 0; row < padded_rows; ++row, in += pitch, out += depth)
    for (int64_t c = 0; c < depth; c += kLanes)
      store(out + c, row < rows && c < width ? load(in + c) : vf{});
}

// Rows as columns of a second operand: [rows][depth], multiples of 16 and 32.
static inline void pack_columns(const BFloat16* in, int64_t rows, int64_t depth, BFloat16* out) {
  for (int64_t row = 0; row < rows; row += kTileEdge)
    for (int64_t c = 0; c < depth; c += kTileDepth, out += kTileHalves)
      transpose_pairs(in + row * depth + c, depth, out);
}

// Rows as rows of a second operand: in [rows][pitch] of `width`, a multiple of 16, with rows of
// zeros up to `padded_rows`, a multiple of 32.
static inline void pack_rows(const float* in, int64_t pitch, int64_t rows, int64_t width,
                             int64_t padded_rows, BFloat16* out) {
  const int64_t column = padded_rows / kTileDepth * kTileHalves;
  for (int64_t row = 0; row < padded_rows; row += 2, in += 2 * pitch, out += kTileDepth)
    for (int64_t c = 0; c < width; c += kTileEdge)
      store_pairs(out + c / kTileEdge * column, row < rows ? load(in + c) : vf{},
                  row + 1 < rows ? load(in + pitch + c) : vf{});
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
