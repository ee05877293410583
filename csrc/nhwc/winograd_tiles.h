// Transforms tiles of NHWC pixels into Winograd's domain and back.
#pragma once

#include "nhwc/winograd.h"
#include "nhwc/winograd_transforms.h"

namespace iddpm {
namespace IDDPM_ISA {

alignas(64) static const float kZeros[kWinogradChannels] = {};

// v[e * element_stride + c] of one tile, e = 0 .. (M + 2)^2 - 1, float or rounded to bfloat16.
template <int M, class T, class V>
static void transform_input(const WinogradConv<T>& op, const Grid& grid, int64_t index, V* v,
                            int64_t element_stride) {
  constexpr int P = M + 2;
  const int64_t column = index % grid.columns, row = index / grid.columns % grid.rows;
  const int64_t sample = index / (grid.columns * grid.rows);
  const int64_t up = op.upscale > 0;
  const int64_t in_width = op.width >> up, in_height = op.height >> up;
  const T* image = op.in + sample * in_height * in_width * op.in_stride;
  const T* zeros = reinterpret_cast<const T*>(kZeros);
  const T* pixel[P][P];
  for (int i = 0; i < P; ++i) {
    const int64_t y = row * M + i - 1;
    const bool inside = y >= 0 && y < op.height;
    for (int j = 0; j < P; ++j) {
      const int64_t x = column * M + j - 1;
      const int64_t source = (y >> up) * in_width + (x >> up);
      pixel[i][j] = inside && x >= 0 && x < op.width ? image + source * op.in_stride : zeros;
    }
  }
  for (int64_t c = 0; c < op.channels; c += kWidth) {
    nv half[P][P];
    IDDPM_UNROLL
    for (int j = 0; j < P; ++j) {
      nv d[P], t[P];
      IDDPM_UNROLL
      for (int i = 0; i < P; ++i) d[i] = load<nv>(pixel[i][j] + c);
      Transform<M>::input(d, t);
      IDDPM_UNROLL
      for (int i = 0; i < P; ++i) half[i][j] = t[i];
    }
    IDDPM_UNROLL
    for (int i = 0; i < P; ++i) {
      nv t[P];
      Transform<M>::input(half[i], t);
      IDDPM_UNROLL
      for (int j = 0; j < P; ++j) store(v + (i * P + j) * element_stride + c, t[j]);
    }
  }
}

// A tile's outputs, summed over 2 x 2 pixels.
template <int M, class T>
static void store_sums(const nv (&half)[M][M + 2], int64_t height, int64_t width, int64_t pixel,
                       int64_t row, T* out) {
  IDDPM_UNROLL
  for (int i = 0; i < M; i += 2) {
    if (i >= height) break;
    nv upper[M], lower[M];
    Transform<M>::output(half[i], upper);
    Transform<M>::output(half[i + 1], lower);
    IDDPM_UNROLL
    for (int j = 0; j < M; j += 2)
      if (j < width)
        store(out + (i / 2 * row + j / 2) * pixel,
              (upper[j] + upper[j + 1]) + (lower[j] + lower[j + 1]));
  }
}

// u[e * element_stride + k] of one tile and `columns` channels from `first` on.
template <int M, class T>
static void transform_output(const WinogradConv<T>& op, const Grid& grid, int64_t index,
                             const float* u, int64_t element_stride, int64_t first,
                             int64_t columns) {
  constexpr int P = M + 2;
  const int64_t column = index % grid.columns, row = index / grid.columns % grid.rows;
  const int64_t sample = index / (grid.columns * grid.rows);
  const int64_t height = smaller(M, op.height - row * M), width = smaller(M, op.width - column * M);
  const int64_t corner = (sample * op.height + row * M) * op.width + column * M;
  for (int64_t k = 0; k < columns; k += kWidth) {
    nv half[M][P];
    IDDPM_UNROLL
    for (int j = 0; j < P; ++j) {
      nv m[P], t[M];
      IDDPM_UNROLL
      for (int i = 0; i < P; ++i) m[i] = load<nv>(u + (i * P + j) * element_stride + k);
      Transform<M>::output(m, t);
      IDDPM_UNROLL
      for (int i = 0; i < M; ++i) half[i][j] = t[i];
    }
    if (op.upscale < 0) {
      store_sums<M>(
          half, height, width, op.out_stride, op.width / 2,
          op.out +
              ((sample * op.height + row * M) * op.width / 4 + column * M / 2) * op.out_stride +
              first + k);
      continue;
    }
    const nv bias = op.bias ? load<nv>(op.bias + first + k) : nv{};
    IDDPM_UNROLL
    for (int i = 0; i < M; ++i) {
      if (i >= height) break;
      nv y[M];
      Transform<M>::output(half[i], y);
      const int64_t start = corner + i * op.width;
      T* out = op.out + start * op.out_stride + first + k;
      if (op.residual) {
        const T* residual = op.residual + start * op.residual_stride + first + k;
        IDDPM_UNROLL
        for (int j = 0; j < M; ++j)
          if (j < width)
            store(out + j * op.out_stride,
                  y[j] + bias + load<nv>(residual + j * op.residual_stride));
      } else {
        IDDPM_UNROLL
        for (int j = 0; j < M; ++j)
          if (j < width) store(out + j * op.out_stride, y[j] + bias);
      }
    }
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
