// Squares of sixteen float lanes, transposed in registers.
#pragma once

#include "common/simd.h"

namespace iddpm {
namespace IDDPM_ISA {

template <int... i>
struct Indices {};
#if defined(__AVX512F__)
using RegisterIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using RegisterIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using RegisterIndices = Indices<0, 1, 2, 3>;
#endif

// Swaps the blocks of H lanes that a transposition takes across the diagonal from a to b.
template <int H, int... i>
IDDPM_INLINE void exchange(nv& a, nv& b, Indices<i...>) {
  const nv low = IDDPM_SHUFFLE(a, b, (i & H ? int(kWidth) + i - H : i)...);
  b = IDDPM_SHUFFLE(a, b, (i & H ? int(kWidth) + i : i + H)...);
  a = low;
}

// Transposes a kWidth x kWidth square: swaps off-diagonal blocks of every size from H down.
template <int H = kWidth / 2>
IDDPM_INLINE void transpose_square(nv (&m)[kWidth]) {
  IDDPM_UNROLL
  for (int i = 0; i < kWidth; ++i)
    if (!(i & H)) exchange<H>(m[i], m[i + H], RegisterIndices{});
  if constexpr (H > 1) transpose_square<H / 2>(m);
}

// Transposes a 16 x 16 square: get(i) gives row i, put(j, row) takes row j of the result.
template <typename Get, typename Put>
IDDPM_INLINE void transpose_lanes(Get get, Put put) {
  if constexpr (kWidth == kLanes) {
    nv m[kWidth];
    IDDPM_UNROLL
    for (int i = 0; i < kWidth; ++i) m[i] = get(i);
    transpose_square(m);
    IDDPM_UNROLL
    for (int i = 0; i < kWidth; ++i) put(i, m[i]);
  } else {
    float from[kLanes * kLanes], to[kLanes * kLanes];
    for (int64_t i = 0; i < kLanes; ++i) store(from + i * kLanes, get(i));
    for (int64_t row = 0; row < kLanes; row += kWidth)
      for (int64_t column = 0; column < kLanes; column += kWidth) {
        nv m[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) m[i] = load<nv>(from + (row + i) * kLanes + column);
        transpose_square(m);
        for (int64_t i = 0; i < kWidth; ++i) store(to + (column + i) * kLanes + row, m[i]);
      }
    for (int64_t j = 0; j < kLanes; ++j) put(j, load(to + j * kLanes));
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
