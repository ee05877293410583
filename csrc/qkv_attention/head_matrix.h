// Copies the matrix [tokens, d] of one head from a tensor to packed float32 and back.
//
// In a tensor either the channels of a token or the tokens of a channel are adjacent (a line). If
// the packed form has the other order, squares of sixteen are transposed.
#pragma once

#include "common/lanes.h"
#include "common/transpose.h"
#include "nhwc/panel.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr int64_t kAlign = kLanes;  // rows of values and of scores are padded to multiples of this

template <typename T>
struct HeadMatrix {
  T* data;
  int64_t token, channel;  // strides in elements; one of them is 1

  bool by_token() const { return channel == 1; }
  HeadMatrix transposed() const { return {data, channel, token}; }
  HeadMatrix from(int64_t t) const { return {data + t * token, token, channel}; }
};

template <typename T>
IDDPM_INLINE HeadMatrix<T> head_matrix(const Plane& plane, int64_t n, int64_t first_channel) {
  T* data = static_cast<T*>(plane.data) + n * plane.sample + first_channel * plane.channel;
  return {data, plane.pixel, plane.channel};
}

// `lines` lines of `length` elements to rows of float32, zero up to the next multiple of 16.
template <typename T>
void read_lines(const T* from, int64_t stride, int64_t lines, int64_t length, float* to,
                int64_t pitch) {
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t j = 0; j < length; j += kLanes)
      store(to + i * pitch + j, load_some(from + i * stride + j, smaller(kLanes, length - j)));
}

// The same, transposed: to [length][pitch].
template <typename T>
void read_transposed(const T* from, int64_t stride, int64_t lines, int64_t length, float* to,
                     int64_t pitch) {
  for (int64_t i = 0; i < lines; i += kLanes)
    for (int64_t j = 0; j < length; j += kLanes) {
      const int64_t rows = smaller(kLanes, lines - i), columns = smaller(kLanes, length - j);
      const T* corner = from + i * stride + j;
      float* target = to + j * pitch + i;
      if (rows == kLanes && columns == kLanes)
        transpose_lanes([&](int64_t row) { return load(corner + row * stride); },
                        [&](int64_t row, vf v) { store(target + row * pitch, v); });
      else
        transpose_lanes(
            [&](int64_t row) {
              return row < rows ? load_some(corner + row * stride, columns) : vf{};
            },
            [&](int64_t row, vf v) {
              if (row < columns) store(target + row * pitch, v);
            });
    }
}

// Copies the matrix to x [tokens][pitch].
template <typename T>
void read_rows(const HeadMatrix<const T>& x, int64_t tokens, int64_t d, float* to, int64_t pitch) {
  if (x.by_token()) return read_lines(x.data, x.token, tokens, d, to, pitch);
  read_transposed(x.data, x.channel, d, tokens, to, pitch);
}

// Copies the matrix, transposed, to panels [ceil(tokens / 32)][d][32]; tokens beyond the last are
// zero up to the next multiple of 16.
template <typename T>
void read_panels(const HeadMatrix<const T>& x, int64_t tokens, int64_t d, float* to) {
  for (int64_t t = 0; t < tokens; t += kPanel) {
    const int64_t count = smaller(kPanel, tokens - t);
    if (x.by_token())
      read_transposed(x.data + t * x.token, x.token, count, d, to + t * d, kPanel);
    else
      read_lines(x.data + t, x.channel, d, count, to + t * d, kPanel);
  }
}

// Copies back: x <- factor * rows [tokens][pitch], pitch at least d rounded up to 16.
template <typename T>
void write_rows(const float* from, int64_t pitch, int64_t tokens, int64_t d, float factor,
                const HeadMatrix<T>& x) {
  if (x.by_token()) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < d; c += kLanes)
        store_some(x.data + t * x.token + c, load(from + t * pitch + c) * factor,
                   smaller(kLanes, d - c));
    return;
  }
  for (int64_t c = 0; c < d; c += kLanes)
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const int64_t rows = smaller(kLanes, tokens - t), columns = smaller(kLanes, d - c);
      const float* corner = from + t * pitch + c;
      T* target = x.data + c * x.channel + t;
      if (rows == kLanes && columns == kLanes)
        transpose_lanes([&](int64_t i) { return load(corner + i * pitch) * factor; },
                        [&](int64_t i, vf v) { store(target + i * x.channel, v); });
      else
        transpose_lanes(
            [&](int64_t i) { return i < rows ? load(corner + i * pitch) * factor : vf{}; },
            [&](int64_t i, vf v) {
              if (i < columns) store_some(target + i * x.channel, v, rows);
            });
    }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
