// Convolutions, 1 x 1 convolutions and linear layers by AMX, with bfloat16 operands.
#pragma once

#include "common/amx.h"
#include "nhwc/operand.h"
#include "nhwc/packing.h"

namespace iddpm {

// out = (sum over taps of in (displaced by the tap) * w) + bias + residual, in float32; bias and
// residual may be null. `in` is the first pixel of an operand image.
struct TileProductOp {
  const OperandMap* map;
  const BFloat16* in;
  int64_t chunks;     // of 32 channels
  int64_t columns;    // out-channels, a multiple of 16
  const BFloat16* w;  // [panels of 32][taps][chunks][2][16][16][2]
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
  BFloat16* out_half;  // null; or the destination of rounded sums, instead of `out`
};

}  // namespace iddpm

IDDPM_DECLARE_AMX(int, run_tile_product, (const iddpm::TileProductOp& op, const iddpm::Team& team))
