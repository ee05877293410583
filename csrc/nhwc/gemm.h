// Linear layers and 1 x 1 convolutions over NHWC pixels.
#pragma once

#include "nhwc/packing.h"
#include "nhwc/team.h"

namespace iddpm {

// out = a * w + bias + residual; bias and residual may be null. Weights are packed as
// [ceil(columns / 32)][depth][32] (`iddpm_ext/engines/cpu/pack.py`).
struct GemmOp {
  int64_t rows;  // rows per sample
  const float* a;
  int64_t a_stride, depth, columns;
  const float* w;  // of run_gemm_bf16: bfloat16, [panels][depth / 2][32][2]
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
};

// Elements of a block of rows, rounded to bfloat16, which stays in the L2 cache.
constexpr int64_t kRoundedHalves = 128 * 1024;
constexpr int64_t kRoundedPad = 32;  // keeps rows from falling into the same cache sets
static constexpr int64_t rounded_rows(int64_t rows, int64_t depth) {
  const int64_t most = larger(kRoundedHalves / (depth + kRoundedPad) / kMostTileRows, 1);
  return smaller(most * kMostTileRows, rows);
}

// Floats of scratch that a thread of run_gemm_bf16 needs for `rows` rows of all samples.
static constexpr int64_t gemm_bf16_scratch(int64_t rows, int64_t depth) {
  return divide_up(rounded_rows(rows, depth) * (depth + kRoundedPad), 2);
}

namespace IDDPM_ISA {

// Like all functions of this kind, returns 0, or 1 if its scratch is too small.
int run_gemm(const GemmOp& op, const Team& team);

}  // namespace IDDPM_ISA

// Kernels of *_bf16.cpp, which are compiled once, for AVX-512 with vdpbf16ps.
namespace avx512_bf16 {

// Operands are rounded to bfloat16.
int run_gemm_bf16(const GemmOp& op, const Team& team);

}  // namespace avx512_bf16
}  // namespace iddpm
