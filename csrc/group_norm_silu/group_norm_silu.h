// GroupNorm with sums before it, and scale, shift and SiLU after it
// (iddpm_ext/ops/group_norm_silu/__init__.py has the equation): the input is x + residual +
// channel_bias, concatenated with x2 if there is one.
#pragma once

#include "common/amx.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace iddpm {

// The input of the forward and of the backward pass. C = c1 + (channels of x2), all planes have
// `dtype`, and either every pixel stride is 1 (NCHW) or every channel stride is (channels_last).
struct GroupNormInput {
  int64_t n, c, c1, hw, groups;
  DType dtype;
  bool channels_last, silu;
  Plane x;                    // [N, C1, HW]
  Plane x2;                   // [N, C - C1, HW], or a null address
  const float* channel_bias;  // [N or 1, C1], added to x, or null
  int64_t channel_bias_stride;
  const float* weight;  // [C]
  const float* bias;    // [C]
  const float* scale;   // [N, C], or null
  const float* shift;   // [N, C], or null
  int64_t scale_stride, shift_stride;
  float* mean;  // [N, groups] of x + channel_bias
  float* rstd;  // [N, groups]
};

struct GroupNormSiluArgs {
  GroupNormInput in;
  float eps;
  Plane residual;  // [N, C1, HW], or a null address
  Plane sum;  // [N, C1, HW] gets x + residual + channel_bias; a null address where there is none
  Plane y;    // [N, C, HW]
  float* workspace;  // group_norm_workspace(in) floats
};

struct GroupNormSiluBwdArgs {
  GroupNormInput in;     // x is the normalised tensor: the forward pass's sum, if it wrote one
  Plane dy;              // [N, C, HW]
  Plane dsum;            // [N, C1, HW] is added to dx, or a null address
  Plane dx, dx2;         // like x and x2
  float* dweight;        // [C]
  float* dbias;          // [C]
  float* dscale;         // [N, C], or null
  float* dshift;         // [N, C], or null
  float* dchannel_bias;  // [N, C1]: dx summed over the pixels, without dsum; or null
  float* workspace;      // group_norm_workspace(in) floats
};

// Pixels per partial sum: fixed, so that no result depends on the batch or on the number of
// threads.
constexpr int64_t kGroupNormSlab = 256;

inline int64_t group_norm_slabs(const GroupNormInput& in) {
  return (in.hw + kGroupNormSlab - 1) / kGroupNormSlab;
}

// Floats of scratch memory: three per channel for every slab and every sample, and three more.
inline int64_t group_norm_workspace(const GroupNormInput& in) {
  return 3 * in.n * in.c * (group_norm_slabs(in) + 2);
}

int group_norm_silu_cuda(const GroupNormSiluArgs& args, void* stream);
int group_norm_silu_bwd_cuda(const GroupNormSiluBwdArgs& args, void* stream);

}  // namespace iddpm

IDDPM_DECLARE_CPU(void, group_norm_silu, (const iddpm::GroupNormSiluArgs& args, int num_threads))
IDDPM_DECLARE_CPU(void, group_norm_silu_bwd,
                  (const iddpm::GroupNormSiluBwdArgs& args, int num_threads))
IDDPM_DECLARE_AMX(void, group_norm_silu_rounded,
                  (const iddpm::GroupNormSiluArgs& args, int num_threads))
IDDPM_DECLARE_AMX(void, group_norm_silu_bwd_rounded,
                  (const iddpm::GroupNormSiluBwdArgs& args, int num_threads))
